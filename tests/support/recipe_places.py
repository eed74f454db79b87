"""Places in documents, examples and JSONs that say how to train with RSO, and whether that is the default recipe.

A place that is meant to be another (a case of an ablation, an example of its own) has ``not the recipe: WHY`` on its
line, on one of the three before it, or so above the fenced block in which it stands.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rso_ds import RSOConfig, defaults

MARK = "not the recipe: "
OF_A_RUN = [f.name for f in fields(defaults.Rates)]
ALIKE: dict[str, tuple[Any, ...]] = {
    "rank_ratio": (defaults.RANK_RATIO,),
    "sampler": (defaults.SAMPLER, defaults.LARGE_SAMPLER),
    "carry_over": (defaults.CARRY_OVER,),
    "targets": (defaults.TARGETS,),
    "betas": (list(defaults.BETAS), defaults.BETAS),
    "eps": (defaults.EPS,),
    "weight_decay": (defaults.WEIGHT_DECAY,),
    "master_weights": (RSOConfig.master_weights, defaults.LARGE_MASTERS),
}
ROWS = (defaults.RANDOM_LONG, defaults.RANDOM_SHORT, defaults.PRETRAINED, defaults.LARGE)
NUMBER = r"(?:0\.\d+|[1-9]\d*(?:\.\d+)?)(?:e-?\d+)?"
KEYS = "lr|dense_lr|interval|rank_ratio"
PROSE = re.compile(rf"`({KEYS})` (?:of )?({NUMBER})(?![\w-]| to | times)")
INLINE = re.compile(rf"\"?\b({KEYS})\"?\s*[:=]\s*({NUMBER})")


@dataclass(frozen=True)
class Place:
    file: str
    line: int
    settings: dict[str, Any]
    marked: bool

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def why_not(self) -> str | None:
        """What is not of the recipe, None if all is."""
        for key, allowed in ALIKE.items():
            if self.settings.get(key, "auto") not in (*allowed, "auto", None):
                return f"{key} is {self.settings[key]!r}, the recipe's {allowed[0]!r}"
        said = {key: self.settings[key] for key in OF_A_RUN if self.settings.get(key, "auto") != "auto"}
        if "lr" in said:  # with what it leaves to RSOConfig's defaults
            said = {**{key: getattr(RSOConfig, key) for key in OF_A_RUN}, **said}
        if any(all(getattr(row, key) == value for key, value in said.items()) for row in ROWS):
            return None
        return f"{said} is none of {', '.join(map(str, ROWS))}"


def places(path: Path, root: Path) -> list[Place]:
    """All in one file, by its kind."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
    lines = text.splitlines()
    found: list[Place] = []

    def add(line: int, settings: dict[str, Any]) -> None:
        if settings:
            begin = line if path.suffix != ".md" else _block_of(lines, line)
            found.append(Place(name, line, settings, any(MARK in part for part in lines[max(0, begin - 4) : line])))

    for line, settings in _python(text) if path.suffix == ".py" else _json_blocks(text):
        add(line, settings)
    for line, settings in _commands(lines):
        add(line, settings)
    if path.suffix == ".md":
        for first, code in _fenced(lines, "python"):
            for line, settings in _python(code):
                add(first + line - 1, settings)
        for number, line_text in enumerate(_without_code(lines), 1):
            for span in re.findall(r"`([^`]+)`", line_text):
                add(number, {key: json.loads(value) for key, value in INLINE.findall(span)})
            add(number, {key: json.loads(value) for key, value in PROSE.findall(line_text)})
    return found


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def _json_blocks(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for match in re.finditer(r'"type":\s*"RSO",?\s*"params":\s*(?=\{(?!\.\.\.))', text):
        params, _ = json.JSONDecoder().raw_decode(text, match.end())
        yield _line(text, match.end()), params


def _python(code: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """``RSOConfig(...)``, ``rso={...}``, ``{"lr": ...}`` and TrainingArguments' rate; constants only."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        found: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            for keyword in node.keywords:
                if keyword.arg == "learning_rate" or name == "RSOConfig":
                    found |= _constant("lr" if keyword.arg == "learning_rate" else str(keyword.arg), keyword.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in (*OF_A_RUN, *ALIKE):
                    found |= _constant(str(key.value), value)
        if found:
            yield node.lineno, found


def _constant(key: str, value: ast.expr) -> dict[str, Any]:
    try:
        return {key: ast.literal_eval(value)}
    except ValueError:
        return {}


def _commands(lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Commands with their continued lines: ``--rso key=value``, ``--set optimizer.params.key=value``, the rate."""
    at = 0
    while at < len(lines):
        first = at
        while lines[at].rstrip().endswith("\\") and at + 1 < len(lines):
            at += 1
        command = " ".join(line.rstrip("\\") for line in lines[first : at + 1])
        at += 1
        if "adamw.json" in command or re.search(r"--method (lora|full)", command):
            continue
        pairs = re.findall(rf"--set optimizer\.params\.({KEYS})=({NUMBER})", command)
        for some in re.findall(r"--rso ((?:\w+=\S+ ?)+)", command):
            pairs += re.findall(rf"\b({KEYS})=({NUMBER})", some)
        if "launch/" in command or "train.py" in command:
            pairs += [("lr", rate) for rate in re.findall(rf"--learning[-_]rate ({NUMBER})", command)]
        if pairs:
            yield first + 1, {key: json.loads(value) for key, value in pairs}


def _fenced(lines: list[str], language: str) -> Iterator[tuple[int, str]]:
    """(line number of its first line, code) of each fenced block."""
    for i, line in enumerate(lines):
        if line.strip() == f"```{language}":
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
            yield i + 2, "\n".join(lines[i + 1 : end])


def _block_of(lines: list[str], line: int) -> int:
    """Number of the line that opens the fenced block around ``line``, which itself where there is none."""
    fences = [n for n, text in enumerate(lines[: line - 1], 1) if text.strip().startswith("```")]
    return fences[-1] if len(fences) % 2 else line


def _without_code(lines: list[str]) -> list[str]:
    """The lines, empty inside fenced blocks."""
    inside, kept = False, []
    for line in lines:
        fence = line.strip().startswith("```")
        kept.append("" if inside or fence else line)
        inside ^= fence
    return kept
