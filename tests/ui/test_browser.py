"""The web interface in a real browser."""

import asyncio
import re
from typing import Any

import pytest
from tests.ui.browser import Browser
from tests.ui.conftest import BAD, GOOD, SCRIPT, Site, first, make_runs, node
from tests.ui.scenes import lineage, make_map
from tests.ui.test_large_run import make_large_run
from tests.ui.test_security import attempts_of

from stroma import Pipeline, SQLiteStore


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.without_scripts(False)
    chromium.size(1280, 900)
    chromium.problems.clear()
    return chromium


def addresses(site: Site) -> list[str]:
    return [
        "/",
        "/?q=nowhere",
        "/run?id=bad",
        "/run?id=good",
        *attempts_of(site),
        "/overview",
        "/pipeline",
        "/run?id=nope",
    ]


@pytest.mark.example
def test_nothing_is_refused_and_nothing_runs(site: Site, browser: Browser) -> None:
    """No page breaks its own policy, says anything on the console, or runs what a run holds."""
    make_runs(site.store, (SCRIPT, Pipeline(SCRIPT, GOOD.nodes)))
    for path in [*addresses(site), "/?q=" + "%3Cscript%3E"]:
        browser.goto(site.url + path)
        assert browser.eval("window.pwned") is None
        assert browser.eval("document.querySelectorAll('main script, main img:not(.lineage)').length") == 0
    assert [problem for problem in browser.problems if "404" not in problem] == []


def test_tables_of_the_overview_fit(store: SQLiteStore, serve: Any, browser: Browser) -> None:
    """At 1,280 pixels no table of the overview has to be scrolled, also with a name that cannot be broken."""
    name = "fetch_" * 12
    make_runs(store, (name, Pipeline(name, [node(name, first)])))
    browser.goto(serve(store).url + "/overview")
    tables = "[...document.querySelectorAll('.wide')]"
    assert browser.eval(f"{tables}.length") > 1
    assert browser.eval(f"{tables}.filter((one) => one.scrollWidth > one.clientWidth).length") == 0


_CONTRAST = """(() => {
  const parts = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (at) => {
    for (; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const at = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !at.checkVisibility() || at.closest("svg, option, .skip")) continue;
    const [a, b] = [light(parts(getComputedStyle(at).color)), light(behind(at))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5)
      low.push(`${ratio.toFixed(2)} ${at.className}: ${walk.currentNode.data.trim().slice(0, 40)}`);
  }
  for (const bar of document.querySelectorAll("svg rect")) {
    const svg = bar.closest("svg"), own = getComputedStyle(bar).fill;
    const fill = own.startsWith("url") ? getComputedStyle(svg).color : own;
    const [a, b] = [light(parts(fill)), light(behind(svg))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 3) low.push(`${ratio.toFixed(2)} bar ${bar.getAttribute("class")}`);
  }
  return low;
})()"""


@pytest.mark.parametrize(
    ("width", "dark"), [(400, False), (1280, False), (1280, True), (2560, False)], ids=str
)
def test_every_page_can_be_read(site: Site, browser: Browser, width: int, dark: bool) -> None:
    """From 400 to 2,560 pixels no page is wider than its window, and a reader of screens has names for it.

    Every text has the contrast of WCAG AA (4.5), every bar that of a graphic (3), light and dark. Every
    control has a name, every page a heading or a search, a language and one main part.
    """
    browser.size(width, 900, dark=dark)
    for path in addresses(site):
        browser.goto(site.url + path)
        assert browser.eval("document.documentElement.scrollWidth") <= width, path
        assert width != 1280 or browser.eval(_CONTRAST) == [], path
        assert browser.eval("document.documentElement.lang") == "en"
        assert browser.eval("document.querySelectorAll('main').length") == 1
        unnamed = browser.eval(
            "[...document.querySelectorAll('input:not([type=hidden]), select, button, a')].filter((one) => "
            "!(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map((one) "
            "=> one.outerHTML)"
        )
        assert unnamed == [], path
        assert browser.eval("document.querySelector('h1, [role=search]') !== null"), path


def test_the_keyboard(site: Site, browser: Browser) -> None:
    """ "/" searches, "j" and "k" go through the rows, enter opens; while one writes they are letters."""
    browser.goto(f"{site.url}/")
    focused = "document.activeElement.textContent.trim()"
    browser.press("j")
    assert browser.eval(focused) == "bad"
    browser.press("j")
    assert browser.eval(focused) == "good"
    browser.press("j")
    assert browser.eval(focused) == "good"
    browser.press("k")
    assert browser.eval(focused) == "bad"
    browser.press("/")
    assert browser.eval("document.activeElement.id") == "search"
    browser.press("j")
    browser.press("/")
    assert browser.eval("document.getElementById('search').value") == "j/"
    browser.press("Escape")
    browser.press("j")
    browser.press("Enter")
    browser.until("location.pathname + location.search", lambda at: at == "/run?id=bad")


def test_live(site: Site, browser: Browser) -> None:
    """An open page shows new runs by itself; what had the focus keeps it, and what was open stays open."""
    browser.goto(f"{site.url}/")
    browser.until("document.getElementById('liveness').textContent", lambda text: text == "live")
    browser.press("j")
    make_runs(site.store, ("fresh", GOOD))
    browser.until(
        "[...document.querySelectorAll('[data-open]')].map((link) => link.textContent.trim()).join()",
        lambda ids: ids.startswith("fresh,bad,good"),
    )
    assert browser.eval("document.activeElement.textContent.trim()") == "bad"

    browser.goto(f"{site.url}/run?id=good")
    browser.until("document.getElementById('liveness').textContent", lambda text: text == "live")
    browser.eval("document.querySelector('.gantt details').open = true")
    browser.eval("window.before = document.getElementById('live')")
    make_runs(site.store, ("good", GOOD), resume_from="flaky", resume=True)
    browser.until("document.querySelector('.top .chip').textContent.includes('RESUMED')")
    assert browser.eval("document.getElementById('live') !== window.before")
    assert browser.eval("document.querySelector('.gantt details').open")

    asyncio.run(site.store.delete("good"))
    browser.until("document.body?.textContent.includes('This store has no such run')")


def test_without_scripts(site: Site, browser: Browser) -> None:
    """All but the live updates works without JavaScript: searching, opening, folding, comparing, deleting."""
    browser.without_scripts()
    try:
        browser.goto(f"{site.url}/?q=tag:nightly&status=failed")
        assert browser.eval("document.querySelectorAll('[data-row]').length") == 1
        browser.goto(f"{site.url}/run?id=bad")
        assert browser.eval("document.querySelectorAll('.gantt .row:not(.axis)').length") == 6
        assert not browser.eval("document.querySelector('.gantt .kids').checkVisibility()")
        browser.eval("document.querySelector('.gantt summary').click()")
        assert browser.eval("document.querySelector('.gantt details').open")
        browser.eval("[...document.forms].find((one) => one.action.endsWith('/delete')).submit()")
        browser.until("location.pathname", lambda path: path == "/")
    finally:
        browser.without_scripts(False)
    assert site.store.get_run("bad") is None


def test_another_site(site: Site, browser: Browser, store: SQLiteStore, serve: Any) -> None:
    """A page of another origin in the same browser can neither read ours nor post to it."""
    other = serve(store)
    key = re.findall(r'name="key" value="(\w+)"', site.get("/run", id="bad").text)[-1]
    browser.goto(f"{other.url}/static/icon.svg")
    report = browser.eval(
        f"Promise.all([fetch('{site.url}/').then((a) => a.text(), () => 'refused'), "
        f"fetch('{site.url}/delete', {{method: 'POST', mode: 'no-cors', headers: {{'content-type': "
        f"'application/x-www-form-urlencoded'}}, "
        f"body: 'id=bad&key={key}'}}).then(() => 'sent', () => 'refused')])"
    )
    assert report[0] == "refused"
    assert site.store.get_run("bad") is not None


def test_a_large_run(site: Site, browser: Browser) -> None:
    """Of 1,000 nodes and 2,000 attempts all are there: a row for each node, a bar for each attempt."""
    make_large_run(site.store)
    browser.goto(f"{site.url}/run?id=large")
    assert browser.eval("document.querySelectorAll('.gantt > .row:not(.axis)').length") == 1000
    assert browser.eval("document.querySelectorAll('.gantt a .b-failure').length") == 1000
    assert browser.eval("document.querySelectorAll('.gantt a .b-success').length") == 1000
    assert browser.eval("document.querySelectorAll('tr[data-row]').length") == 2000
    assert browser.eval("document.documentElement.scrollWidth") <= 1280
    wide = "[...document.querySelectorAll('.gantt a')].every((one) => one.getBoundingClientRect().width > 0)"
    assert browser.eval(wide)
    browser.eval(
        "[...document.querySelectorAll('.gantt a')].pop().dispatchEvent(new MouseEvent('click', {bubbles: "
        "true, cancelable: true}))"
    )
    heading = "document.querySelector('#panel:not([hidden]) h1')?.textContent ?? ''"
    browser.until(heading, lambda text: text.split() == ["step-999", "attempt", "2"])
    assert browser.eval("location.pathname") == "/run"
    assert browser.problems == []


def test_an_attempt_beside_its_run(site: Site, browser: Browser) -> None:
    """A click on a bar shows its attempt beside the run; its address leads back to it; Escape closes it."""
    heading = "document.querySelector('#panel:not([hidden]) h1')?.textContent ?? ''"
    browser.goto(f"{site.url}/run?id=bad")
    assert browser.eval("document.getElementById('panel').hidden")
    browser.eval("document.querySelectorAll('tr[data-row] a')[0].click()")
    browser.until(heading, lambda text: text.split() == ["first", "attempt", "1"])
    assert browser.eval("document.activeElement.id") == "panel"
    assert browser.eval("document.querySelectorAll('.gantt a.sel').length") == 1
    address = browser.eval("location.href")
    browser.press("Escape")
    browser.until(heading, lambda text: text == "")
    assert browser.eval("location.hash") == ""
    browser.goto(f"{site.url}/")
    browser.goto(address)
    browser.until(heading, lambda text: text.split() == ["first", "attempt", "1"])
    browser.size(1440, 900)
    browser.goto(f"{site.url}/run?id=bad&again=1")
    browser.until(heading, lambda text: text.split() == ["total", "attempt", "1"])


def test_cells_and_zoom(site: Site, browser: Browser) -> None:
    """A cell names its item and opens its attempt; a drag over the time axis shows that part, a link all."""
    asyncio.run(make_map(site.store, 40, "map"))
    browser.goto(f"{site.url}/run?id=map")

    def mouse(kind: str, x: float, y: float) -> None:
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    box = browser.eval("(({x, y}) => [x, y])(document.querySelector('.cells').getBoundingClientRect())")
    mouse("mouseMoved", box[0] + 17 * 14 + 5, box[1] + 5)
    browser.until(
        "document.querySelector('.strip output').textContent", lambda text: text == "item 17: failed"
    )
    for kind in ("mousePressed", "mouseReleased"):
        mouse(kind, box[0] + 17 * 14 + 5, box[1] + 5)
    browser.until(
        "document.querySelector('#panel:not([hidden]) .facts')?.innerText ?? ''", lambda text: "0.17" in text
    )

    axis = browser.eval(
        "(({x, y, width}) => [x, y, width])(document.querySelector('.axis .lane').getBoundingClientRect())"
    )
    mouse("mousePressed", axis[0] + axis[2] * 0.25, axis[1] + 10)
    mouse("mouseMoved", axis[0] + axis[2] * 0.5, axis[1] + 10)
    mouse("mouseReleased", axis[0] + axis[2] * 0.5, axis[1] + 10)
    browser.until("new URLSearchParams(location.search).has('from')")
    browser.until("document.querySelector('#tools a')?.textContent ?? ''", lambda text: text == "Fit")


def test_the_lineage_pans_and_zooms(store: SQLiteStore, serve: Any, browser: Browser) -> None:
    """The lineage fits its frame, grows with buttons and keys, and is never wider than it can scroll."""
    make_runs(store, ("good", GOOD))
    site: Site = serve(store, pipeline="flows", lineage=lineage(BAD))
    browser.goto(f"{site.url}/pipeline")
    width = "document.querySelector('.view svg').getBoundingClientRect().width"
    fitted = browser.eval(width)
    assert fitted <= browser.eval("document.querySelector('.view').clientWidth")
    browser.eval("document.querySelector('[data-zoom=in]').click()")
    assert browser.eval(width) > 1.2 * fitted
    browser.eval("document.querySelector('.view').focus()")
    browser.press("0")
    assert abs(browser.eval(width) - fitted) < 2
    assert browser.eval("document.documentElement.scrollWidth") <= 1280
