"""What others say of the pages: axe-core for screen readers, html-validate for the HTML."""

import asyncio
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.kit import failing_with
from tests.ui.browser import Browser
from tests.ui.conftest import BAD, GOOD, SCRIPT, Site, State, make_runs, node
from tests.ui.page_tools import AXE, missing, page_tools, validate
from tests.ui.scenes import lineage
from tests.ui.test_security import attempts_of

from stroma import Pipeline, SQLiteStore, StromaRunner, Suspend
from stroma.ui.settings import Submission

#: The tools of others take long to look at all pages.
pytestmark = pytest.mark.nightly


@pytest.fixture
def home() -> Path:
    result = page_tools()
    if result is None:
        missing("npm cannot install axe-core and html-validate here")
    assert result is not None
    return result


@pytest.fixture
def pages(tmp_path: Path, serve: Any) -> list[str]:
    """The address of every kind of page, whole and empty."""
    store, empty = SQLiteStore(tmp_path / "runs.db"), SQLiteStore(tmp_path / "none.db")
    waits = Pipeline("flows", [node("asks", failing_with(Suspend, "may it be billed?"))])
    make_runs(store, ("good", GOOD), ("bad", BAD), ("waits", waits), tags=("nightly", SCRIPT[:40]))
    make_runs(store, (SCRIPT, BAD), state=State(text="a\x00b\u202e"))
    runner = StromaRunner.quick(store=store)
    asyncio.run(runner.submit(GOOD, State(), run_id="queued", key=SCRIPT, delay=60, expires=99))
    submission = Submission(State, lambda state, run_id: runner.submit(GOOD, state, run_id=run_id))
    site: Site = serve(store, pipeline="flows", lineage=lineage(GOOD), submission=submission)
    bare: Site = serve(empty)
    requests = [
        "/",
        "/?q=nowhere",
        "/?status=failed&class=TERMINAL",
        "/run?id=bad",
        "/run?id=good",
        "/run?id=waits",
        "/run?id=queued",
        "/submit",
        *attempts_of(site),
        *attempts_of(site, SCRIPT),
        "/overview",
        "/overview?days=1",
        "/pipeline",
        "/run?id=nope",
        "/export?id=bad&format=html",
    ]
    return [site.url + path for path in requests] + [
        bare.url + path for path in ("/", "/overview", "/pipeline")
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_accessible(pages: list[str], home: Path, chromium: Browser, tmp_path: Path, dark: bool) -> None:
    """axe-core finds nothing against WCAG 2.2 AA and its own advice: light and dark, narrow and wide."""
    axe = (home / "node_modules" / "axe-core" / "axe.min.js").read_text()
    findings: dict[str, list[Any]] = {}
    for address in pages:
        at = address
        if "/export" in address:  # To be saved, and opened from there.
            file = tmp_path / "run.html"
            file.write_bytes(urllib.request.urlopen(address).read())
            at = file.as_uri()
        for width in (400, 1440):
            chromium.size(width, 900, dark=dark)
            chromium.goto(at)
            if width > 1000:  # The attempt that stopped a run opens beside it.
                chromium.until("!document.querySelector('#panel[data-first]')?.hidden")
            chromium.eval(f"{axe}; 0")
            for wrong in chromium.eval(AXE):
                findings.setdefault(wrong, []).append((address, width))
    assert not findings, "\n".join(f"{wrong}\n  on {pages[0]}" for wrong, pages in findings.items())


def test_valid(pages: list[str], home: Path, tmp_path: Path) -> None:
    """Every page is valid HTML, as it is served."""
    texts = {}
    for address in pages:
        try:
            with urllib.request.urlopen(address) as answer:
                texts[address] = answer.read().decode()
        except urllib.error.HTTPError as answer:
            texts[address] = answer.read().decode()
    folder = tmp_path / "pages"
    folder.mkdir()
    assert validate(home, texts, folder) == []


def test_they_find_what_is_wrong(home: Path, chromium: Browser, serve: Any, tmp_path: Path) -> None:
    """A page without names, contrast or an end is found: nobody looks at nothing."""
    wrong = (
        "<!doctype html><html><head><title>x</title></head><body><img src='x'><p id='a' "
        "id='a'><div></p></body></html>"
    )
    assert validate(home, {"wrong": wrong}, tmp_path)
    site: Site = serve(SQLiteStore(tmp_path / "none.db"))
    chromium.goto(site.url)
    chromium.eval((home / "node_modules" / "axe-core" / "axe.min.js").read_text() + "; 0")
    chromium.eval(
        "document.querySelector('main').innerHTML += '<input><p "
        'style="color:#aaa;background:#fff">pale</p>\''
    )
    result = chromium.eval(AXE)
    assert any(one.startswith("label:") for one in result), result
