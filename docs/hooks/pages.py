"""Pages made when the site is built: from files elsewhere in the repository, and from the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.hooks.reference import reference_pages

ROOT = Path(__file__).parents[2]
TAKEN = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
"""What the site shows as it is, in its place."""
SHOWN = ("examples/**/*.py", "examples/**/*.yaml", "configs/**/*.yaml")
"""What it shows as code, each file on a page."""
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add them."""
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path, content in (*_code_pages(), *reference_pages(), ("index.md", _read("README.md"))):
        files.append(File.generated(config, path, content=content))
    return files


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _code_pages() -> Iterator[tuple[str, str]]:
    """A page for each file, and one with all configurations."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            yield f"{name}.md", f"{UNSEARCHED}# {name}\n\n{_fenced(path)}"
    folder = ROOT / "configs"
    parts = [f"## {path.relative_to(folder).as_posix()}\n\n{_fenced(path)}" for path in sorted(folder.glob("**/*.yaml"))]
    yield (
        "configs/index.md",
        "\n".join(["# Configurations\n\nThe files of `configs/`: one question each, to paste from.\n", *parts]),
    )


def _fenced(path: Path) -> str:
    return f"````{path.suffix[1:].replace('py', 'python')}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"
