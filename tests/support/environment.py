"""Settings that every test process and benchmark needs before torch or DeepSpeed is imported."""

import importlib.util
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Builds of DeepSpeed's ops are kept between runs, in a folder of the tests' own for each environment: two that share
# one would build anew at every turn, and wait for each other's locks.
EXTENSIONS = Path(tempfile.gettempdir()) / f"rso_ds_test_extensions_{os.getuid()}_{zlib.crc32(sys.prefix.encode()):08x}"


def prepare() -> None:
    """Set them, where the caller has not, and remove stale locks of DeepSpeed's builds."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A lock left by a killed build makes DeepSpeed wait for ever, without a word.
    for lock in EXTENSIONS.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            lock.unlink()


def needs(*packages: str) -> None:
    """Skip the test module that calls this if a package is not installed. Nothing is imported: that takes its time."""
    import pytest

    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}", allow_module_level=True)
