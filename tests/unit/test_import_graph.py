"""Arrows between modules point down (``[tool.importlinter]`` in pyproject.toml). Imports inside functions count."""

import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from support.environment import ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def lint(folder: Path) -> subprocess.CompletedProcess:
    """Check the contracts of the checkout in ``folder``."""
    environment = {"PATH": "", "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", LINT], capture_output=True, text=True, cwd=folder, env=environment)


def test_modules_import_only_what_is_below_them():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_needs_itself():
    """Single modules too, and packages' own ``__init__``, which the contracts do not compare with their parts."""
    graph = grimp.build_graph("rso_ds", cache_dir=None)
    TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("layers/base.py", "from rso_ds.boundary import Boundary"),
        ("comm/replicas.py", "def late():\n    from rso_ds.engines.optimizer import RSO"),
        ("planning/memory/peak.py", "import rso_ds"),
    ],
)
def test_an_upward_import_is_found(tmp_path, module, planted):
    """The contracts are not empty: each of these breaks them."""
    shutil.copytree(ROOT / "rso_ds", tmp_path / "rso_ds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "rso_ds" / module, "a", encoding="utf-8") as f:
        f.write(f"\n\n{planted}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
