"""A check at the end of the build: every link to a file or a place of the site leads somewhere.

Links to other sites are not fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class Links(HTMLParser):
    """The links of one page, and the places in it that a link can name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.places.add(value)
            elif name in ("href", "src"):
                self.links.append(value)


def dead_links(site: Path) -> Iterator[tuple[Path, str]]:
    """Page and link, for every link inside a built site that leads nowhere."""
    pages = {page.resolve(): Links(page) for page in sorted(site.rglob("*.html"))}
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            place = unquote(parts.fragment)
            if not target.exists() or (
                place and target in pages and place not in pages[target].places
            ):
                yield page.relative_to(site.resolve()), link


def check(app: Sphinx, failed: Exception | None) -> None:
    """Warn of every dead link of a site that has just been built."""
    from sphinx.util import logging

    if failed is None and app.builder.name == "html":
        for page, link in dead_links(Path(app.outdir)):
            logging.getLogger(__name__).warning("%s: the link %s leads nowhere", page, link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the check."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
