"""The documents: every command says how it is tested, links and anchors hold, the site builds without a warning."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE
from support.progress import run_command

BENCHMARKS = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "benchmarks").rglob("*.md"))]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "launch/README.md", *BENCHMARKS]
DOCUMENTS += [f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (?:(run)|tested: (\S+)::(\w+)|not run: (.+)) -->")


@dataclass
class Block:
    where: str
    mark: str
    text: str


def blocks(document: str) -> list[Block]:
    """Its blocks of bash and Python, each with the line before it."""
    found = []
    lines = (ROOT / document).read_text().splitlines()
    for i, line in enumerate(lines):
        if line.strip() in ("```bash", "```python"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
            text = "\n".join(part.strip() if line != line.strip() else part for part in lines[i + 1 : end])
            found.append(Block(f"{document}:{i + 1}", lines[i - 1].strip(), text))
    return found


RUN = [block for document in DOCUMENTS for block in blocks(document) if block.mark == "<!-- run -->"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_run_or_tested_or_says_why_not(document):
    for block in blocks(document):
        mark = MARK.fullmatch(block.mark)
        assert mark, f"{block.where}: the line before it must say <!-- run -->, tested: or not run:"
        if mark[2]:
            path = ROOT / mark[2]
            assert path.is_file(), f"{block.where}: {mark[2]} does not exist"
            assert re.search(rf"^def {mark[3]}\(", path.read_text(), flags=re.M), f"{block.where}: no test {mark[3]}"


def test_some_commands_are_run():
    assert len(RUN) >= 5


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.where, marks=() if block.where.startswith("README.md") else EXHAUSTIVE)
        for block in RUN
    ],
)
def test_command_runs(block, tmp_path):
    for name in ("ds_configs", "launch", "examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run_command(["bash", "-euo", "pipefail", "-c", block.text], cwd=tmp_path, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr[-3000:]


def anchor(title: str) -> str:
    """As GitHub, and mkdocs too for titles like ours, make it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_between_documents_hold(document):
    path = ROOT / document
    for first, second in re.findall(r"\]\(([^)]+)\)|^\[\w+\]: (\S+)", path.read_text(), flags=re.M):
        target, _, fragment = (first or second).partition("#")
        if target.startswith("http"):
            continue
        there = path.parent / target if target else path
        assert there.exists(), target
        if fragment:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.M)
            assert fragment in [anchor(title) for title in titles], f"{target}#{fragment}"


@EXHAUSTIVE
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    done = run_command(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    pages = {p.name for p in (tmp_path / "site").iterdir()}
    assert pages >= {Path(document).stem for document in DOCUMENTS if document.startswith("docs/")} - {"index"}
    assert all((tmp_path / "site" / "source" / Path(name).parent).is_dir() for name in BENCHMARKS)
    assert "rank_ratio" in (tmp_path / "site" / "api" / "index.html").read_text()
    assert (tmp_path / "site" / "source" / "tests" / "reference" / "rso.py.txt").is_file()


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(listed) == sorted(Path(d).name for d in DOCUMENTS if d.startswith("docs/"))


@EXHAUSTIVE
def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "figures" / "draw.py"
    assert run_command([sys.executable, str(script), str(tmp_path)]).returncode == 0
    drawn = {p.name for p in tmp_path.glob("*.svg")}
    assert drawn == {p.name for p in script.parent.glob("*.svg")}
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    assert all(f"figures/{name}" in text for name in drawn)
