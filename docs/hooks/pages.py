"""Pages that are generated when the site is built: from files elsewhere in the repository, and from the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.hooks.reference import reference_pages

ROOT = Path(__file__).parents[2]
COPIED_FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
"""Files that the site shows unchanged, at their path."""
CODE_FILES = ("examples/**/*.py", "examples/**/*.yaml", "configs/**/*.yaml")
"""Files that the site shows as code, each on a page of its own."""
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the generated pages to the files of the site."""
    for pattern in COPIED_FILES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path, content in (*_code_pages(), *reference_pages(), ("index.md", _read("README.md"))):
        files.append(File.generated(config, path, content=content))
    return files


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _code_pages() -> Iterator[tuple[str, str]]:
    """Yield a page for each file with code, and one page with all configurations."""
    for pattern in CODE_FILES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            yield f"{name}.md", f"{NOT_SEARCHED}# {name}\n\n{_fenced(path)}"
    folder = ROOT / "configs"
    parts = [f"## {path.relative_to(folder).as_posix()}\n\n{_fenced(path)}" for path in sorted(folder.glob("**/*.yaml"))]
    yield (
        "configs/index.md",
        "\n".join(["# Configurations\n\nThe files of `configs/` answer one question each; paste from them.\n", *parts]),
    )


def _fenced(path: Path) -> str:
    return f"````{path.suffix[1:].replace('py', 'python')}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"
