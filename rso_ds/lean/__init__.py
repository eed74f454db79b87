"""The rest of the block: exact layers that keep less for backward than Hugging Face's."""

from rso_ds.lean.apply import apply_lean, remove_lean

__all__ = ["apply_lean", "remove_lean"]
