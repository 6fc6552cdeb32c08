"""Links that work on GitHub, where pages stand in folders of a repository, made to work on the site."""

from __future__ import annotations

import posixpath
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.pages import Page

_BEFORE_MKDOCS = 10
"""mkdocs checks links with a priority of 0."""
_page: list[str] = []
"""Of the page that is being rendered: where its source is in the repository, and where on the site."""


class _Links(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter():
            for attribute in ("href", "src"):
                if link := element.get(attribute):
                    element.set(attribute, as_on_site(link, *_page) if _page else link)


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Markdown's name
        md.treeprocessors.register(_Links(md), "repository_links", _BEFORE_MKDOCS)


def on_config(config: Any, **_: Any) -> Any:
    """Have links rewritten."""
    config.markdown_extensions.append(_Extension())
    return config


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Remember which page is next."""
    place = page.file.src_uri
    source = (
        "README.md" if place == "index.md" or place.startswith("reference/") else place if _is_elsewhere(place) else f"docs/{place}"
    )
    _page[:] = [source, place]
    return markdown


def _is_elsewhere(place: str) -> bool:
    return place.startswith(("benchmarks/", "examples/", "configs/")) or place in {"CHANGELOG.md", "CONTRIBUTING.md"}


def as_on_site(link: str, source: str, place: str) -> str:
    """A link from a file of the repository as one from its page on the site.

    Args:
        link: As it is written.
        source: The file, from the root of the repository.
        place: The page's source, from the root of the site.
    """
    path, anchor, rest = link.partition("#")
    if not path or ":" in path or path.startswith("/"):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in {"README.md", "docs"}:
        target = "index.md"
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif target.endswith((".py", ".yaml")):
        target = f"{target}.md"
    elif not posixpath.splitext(target)[1]:
        target = f"{target}/index.md"
    return posixpath.relpath(target, posixpath.dirname(place) or ".") + anchor + rest
