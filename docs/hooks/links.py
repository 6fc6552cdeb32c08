"""Rewrite links that work on GitHub, where pages are files of a repository, into links that work on the site."""

from __future__ import annotations

import posixpath
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.pages import Page

_PRIORITY = 10
"""Priority of the rewriting; mkdocs checks links later, with priority 0."""
_page: list[str] = []
"""Path of the source of the page that is being rendered, in the repository and on the site."""


class _Links(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter():
            for attribute in ("href", "src"):
                if link := element.get(attribute):
                    element.set(attribute, as_on_site(link, *_page) if _page else link)


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Markdown's name
        md.treeprocessors.register(_Links(md), "repository_links", _PRIORITY)


def on_config(config: Any, **_: Any) -> Any:
    """Register the extension that rewrites links."""
    config.markdown_extensions.append(_Extension())
    return config


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Note which page is rendered next."""
    place = page.file.src_uri
    if place == "index.md":
        source = "README.md"
    elif _is_outside_docs(place):
        source = place
    else:
        source = f"docs/{place}"
    _page[:] = [source, place]
    return markdown


def _is_outside_docs(place: str) -> bool:
    return place.startswith(("benchmarks/", "examples/", "configs/")) or place in {"CHANGELOG.md", "CONTRIBUTING.md"}


def as_on_site(link: str, source: str, place: str) -> str:
    """Translate a link in a file of the repository into one for its page on the site.

    Args:
        link: The link in the file.
        source: Path of the file, from the root of the repository.
        place: Path of the page's source, from the root of the site.
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
