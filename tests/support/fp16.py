"""fp16 runs on CPUs that have no fast fp16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fp16_on_any_cpu() -> Iterator[None]:
    """DeepSpeed asks oneDNN whether this CPU has fast fp16; torch computes fp16 on any CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported
