"""Settings that every test process needs before torch or DeepSpeed is imported."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A lock left by a killed process makes DeepSpeed wait for ever: keep test builds in a folder of their own.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / "rso_ds_test_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
