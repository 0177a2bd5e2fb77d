"""What a page may hold that has to stand by itself."""

import html.parser
import re

from tests.kit import words

_NEVER = words("""
    applet audio base embed form foreignobject frame iframe image img link object script set source use video
""")


class Page(html.parser.HTMLParser):
    """What a page loads, runs and refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.style = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.style += data


def check_page(text: str) -> Page:
    """A page that loads nothing and runs nothing, whatever it says."""
    page = Page(text)
    assert not set(_NEVER) & set(page.tags), set(_NEVER) & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name not in ("style", "src", "srcdoc", "action", "xlink:href"), name
        if name == "href":
            assert str(value).startswith("#"), value
    assert "@import" not in page.style
    assert not re.search(r"url\((?!#)", page.style)
    return page
