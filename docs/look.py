"""Check the built site: its links, its resources and its accessibility.

Every page is read: links and anchors lead somewhere, nothing comes from elsewhere, pictures have a text, headings come in order,
one main landmark and a language are there. Then some pages of each kind are opened in Chromium, where there is one, light and
dark: no request goes to another host, the console has no messages, axe-core has no findings, and the search finds pages,
from a web server and from the disk.
"""

from __future__ import annotations

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parent.parent
#: Pages of each kind.
SHOWN = (
    "index.html",
    "tutorial/05-checkpoints-and-resume.html",
    "howto/debug-at-night.html",
    "concepts/hooks.html",
    "guarantees.html",
    "reference/hooks.html",
    "telemetry/sentry.html",
    "comparison.html",
    "source/examples/streaming.py.html",
)
#: Pages to open at the width of a phone.
NARROW = ("comparison.html", "tutorial/10-tracing.html")
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Page(html.parser.HTMLParser):
    """Ids, links, headings and problems of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.wrong: list[str] = []
        self.levels: list[int] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if name := given.get("id"):
            self.ids.append(name)
        if tag == "a" and (href := given.get("href")) is not None:
            self.links.append(href)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(given.get("href") or "")
        if tag in _LOADS and (source := given.get(_LOADS[tag])):
            self.loads.append(source)
        if tag == "img" and not given.get("alt"):
            self.wrong.append(f"an image without a text: {given.get('src')}")
        if tag == "html" and not given.get("lang"):
            self.wrong.append("no language")
        if tag in _HEADINGS:
            self.levels.append(int(tag[1]))

    def problems(self) -> Iterator[str]:
        yield from self.wrong
        if self.tags.count("main") != 1:
            yield f"{self.tags.count('main')} main landmarks"
        if self.levels.count(1) != 1:
            yield f"{self.levels.count(1)} headings of the first level"
        for before, after in itertools.pairwise(self.levels):
            if after > before + 1:
                yield f"a heading of level {after} follows one of level {before}"
        for load in self.loads:
            if ":" in load.split("/")[0] or load.startswith("//"):
                yield f"it loads {load}"


def read(site: Path) -> list[str]:
    """Return the problems in the HTML of the pages."""
    pages = {
        path: Page(path.read_text("utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"
    }
    wrong = []
    for path, page in pages.items():
        found = list(page.problems())
        for link in page.links:
            target, anchor = urldefrag(link)
            if ":" in target.split("/")[0] or target.startswith("//"):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_relative_to(site.resolve()) or not there.exists():
                found.append(f"a broken link: {link}")
            elif anchor and there in pages and unquote(anchor) not in pages[there].ids:
                found.append(f"a link to a missing anchor: {link}")
        wrong += [f"{path.relative_to(site)}: {problem}" for problem in dict.fromkeys(found)]
    return wrong


# ---------------------------------------------------------------------- in a browser


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The site on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def axe() -> str:
    """Return the text of axe-core, as a package ships it."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("axe.min.js").read_text("utf-8")


AXE = """
axe.run(document, {resultTypes: ['violations']}).then(found => JSON.stringify(found.violations.map(
  one => one.id + ' (' + one.impact + '): ' + one.nodes.slice(0, 3).map(node => node.target.join(' ')).join(' | '))))
"""
#: Of other hosts; what is inside the page is no request.
ELSEWHERE = """
performance.getEntriesByType('resource').map(entry => entry.name)
  .filter(name => !name.startsWith(location.origin + '/') && !/^(data|blob):/.test(name))
"""


#: The longest line of each block of code that does not fit its column.
WIDE = """[...document.querySelectorAll(".md-content pre")].filter((block) => block.scrollWidth > block.clientWidth)
  .map((block) => block.innerText.split("\\n").reduce((a, b) => a.length > b.length ? a : b))"""
#: Accepted findings of axe-core, each with its reason.
ACCEPTED = {"landmark-unique": "the theme's list of pages has lists in it, all under one name"}


def browse(site: Path, pictures: Path | None) -> list[str]:
    """Return the problems of some pages in a real browser."""
    sys.path.insert(0, str(ROOT))
    from tests.ui.browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        print("no Chromium: the pages were read, not opened")
        return []
    wrong = []
    with served(site) as url:
        for scheme in ("light", "dark"):
            # A browser each: the page remembers which scheme it was shown in.
            with Browser(program) as browser:
                browser.size(1280, 900, dark=scheme == "dark")
                for name in SHOWN:
                    browser.goto(f"{url}/{name}")
                    wrong += [f"{name}, {scheme}: {problem}" for problem in opened(browser)]
                    if not name.startswith("source/"):
                        wrong += [f"{name}: wider than its column: {line}" for line in browser.eval(WIDE)]
                    if pictures is not None:
                        pictures.mkdir(parents=True, exist_ok=True)
                        browser.screenshot(pictures / f"{name.replace('/', '-')}-{scheme}.png")
                ground = browser.eval(
                    "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
                )
                if (ground < 128) != (scheme == "dark"):
                    wrong.append(f"the page is not {scheme}")
                wrong += found_by_searching(browser, f"{url}/index.html")
                browser.size(390, 844, dark=scheme == "dark")
                for name in NARROW:
                    browser.goto(f"{url}/{name}")
                    wrong += [f"{name}, narrow: {problem}" for problem in opened(browser)]
                    if browser.eval("document.documentElement.scrollWidth > innerWidth"):
                        wrong.append(f"{name}, narrow: it is wider than the screen")
                browser.size(1280, 900, dark=scheme == "dark")
                wrong += from_the_disk(browser, site)
    return wrong


def opened(browser: Any) -> list[str]:
    """Return the problems of the open page."""
    # Colours change gradually when the page takes its scheme.
    browser.eval(
        "document.head.insertAdjacentHTML('beforeend', '<style>*{transition:none!important}</style>')"
    )
    found = [f"asks for {other}" for other in browser.eval(ELSEWHERE)]
    browser.eval(f"{axe()};0")
    found += [
        problem for problem in json.loads(browser.eval(AXE)) if problem.partition(" ")[0] not in ACCEPTED
    ]
    found += [f"the console says {problem}" for problem in browser.problems]
    browser.problems.clear()
    return found


def from_the_disk(browser: Any, site: Path) -> list[str]:
    """Return the problems of a page that is opened from the disk: it can be read, and its search finds other pages."""
    page = (site / "howto" / "rate-limits.html").as_uri()
    browser.goto(page)
    if not browser.eval("document.querySelector('main h1').innerText.trim()"):
        return ["a page opened from the disk cannot be read"]
    return [f"from the disk: {problem}" for problem in found_by_searching(browser, page)]


def found_by_searching(browser: Any, page: str) -> list[str]:
    """Return the problems of the search: it finds a page by words in it, without any other host."""
    browser.goto(page)
    browser.until("document.querySelector('.md-search__button') !== null")
    browser.eval("document.querySelector('.md-search__button').click()")
    browser.until("document.activeElement.shadowRoot !== null")
    browser.write("email once")
    try:
        browser.until("document.activeElement.shadowRoot.textContent.includes('send an email once')")
    except AssertionError:
        return ["the search does not find a page by its words"]
    return []


def look(site: Path, pictures: Path | None = None) -> list[str]:
    """Return the problems of a site. ``pictures``: a folder for screenshots of some pages."""
    site = site.resolve()
    return read(site) + browse(site, pictures)
