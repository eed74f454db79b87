"""The rest of the block: exact layers that keep less for backward than Hugging Face's."""

from rso_ds.saved.apply import apply_lean, pass_on, remove_lean

__all__ = ["apply_lean", "pass_on", "remove_lean"]
