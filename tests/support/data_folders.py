"""Folders of small data files, and cards of datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

EN_FR = ["en/train.jsonl", "fr/train.jsonl", "fr/test.jsonl"]


def make(folder: Path, *names: str) -> Path:
    """``folder`` with a file of each of ``names``, whose one text is that name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def card(*configs: dict) -> str:
    """README.md of a dataset with these subsets."""
    return f"---\n{yaml.safe_dump({'license': 'mit', 'configs': list(configs)})}---\n# A dataset\n"


def config(data_files: object = None, name: str = "default", **more: object) -> dict:
    """A subset of a card."""
    return {"config_name": name, **({} if data_files is None else {"data_files": data_files}), **more}


def splits(**paths: object) -> list:
    """``data_files`` of a subset, by split."""
    return [{"split": split, "path": path} for split, path in paths.items()]
