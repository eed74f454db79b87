"""mkdocs hooks: the documents link to files outside docs/, and the site takes those files in.

A Markdown file becomes a page of the site, any other file is copied as text, and links are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "source"  # where the site keeps them
LINK = re.compile(r"(\]\(|^\[[\w-]+\]: )([^)\s#]+)", flags=re.M)


def on_files(files: Files, config: Any) -> Files:
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for _, link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = _in_repository(page, link)
            if path is None or path in seen or path.startswith("docs/"):
                continue
            seen.add(path)
            text = _text(ROOT / path)
            files.append(File.generated(config, _on_site(path), content=text))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    origin = here.removeprefix(f"{OUTSIDE}/") if here.startswith(f"{OUTSIDE}/") else f"docs/{here}"

    def rewritten(match: re.Match[str]) -> str:
        path = _in_repository(origin, match[2])
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(_on_site(path), posixpath.dirname(here) or ".")

    return LINK.sub(rewritten, markdown)


def _in_repository(page: str, link: str) -> str | None:
    """The linked file or folder, from the root; None for what is no file of ours."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (ROOT / path).exists() else None


def _on_site(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" if path.endswith(".md") else f"{OUTSIDE}/{path}.txt"


def _text(path: Path) -> str:
    if path.is_dir():
        return "".join(f"{child.name}\n" for child in sorted(path.iterdir()) if not child.name.startswith(("_", ".")))
    return path.read_text(encoding="utf-8")
