"""What the web interface refuses, and what a hostile store cannot do to it."""

import asyncio
import base64
import html
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from tests.checkpoint import large_stores
from tests.kit import Note, computing, passing, undone_command, words
from tests.trace.standalone_pages import Page
from tests.ui.conftest import BAD, GOOD, SCRIPT, Site, State, make_runs, node

from stroma import Pipeline, SQLiteStore, StromaRunner, Suspend, stroma_node
from stroma.cli import main
from stroma.ui.events import Events

PAGES = ("/", "/overview", "/run?id=bad", "/pipeline")


def attempts_of(site: Site, run_id: str = "bad") -> list[str]:
    """The addresses of a run's attempts, in the order of the timeline."""
    timeline = site.get("/run", id=run_id).text.partition('id="timeline"')[2]
    result = re.findall(r'href="(/attempt\?[^"]*)"', timeline)
    return list(dict.fromkeys(address.replace("&amp;", "&") for address in result))


def keys(site: Site, run_id: str = "bad") -> dict[str, str]:
    """The keys of the forms on a run's page."""
    text = site.get("/run", id=run_id).text
    return dict(
        re.findall(
            r'action="/(\w+)"><input type="hidden" name="id" value="[^"]*"><input type="hidden" name="key" '
            r'value="(\w+)"',
            text,
        )
    )


@pytest.mark.core
def test_other_names_are_refused(site: Site) -> None:
    """A foreign Host is refused for all addresses: a name elsewhere may lead here (DNS rebinding)."""
    for host in (
        "evil.example",
        f"evil.example:{site.port}",
        "127.0.0.1",
        f"127.0.0.1.evil.example:{site.port}",
        "",
    ):
        for path in (*PAGES, "/events", "/static/ui.js", "/payload"):
            answer = site.ask("GET", path, host=host)
            assert answer.status in (400, 421), (host, path)
            assert b"flows" not in answer.body
    assert site.ask("GET", "/", host=f"LOCALHOST:{site.port}").status == 200


@pytest.mark.core
def test_pages_of_other_sites_are_refused(site: Site) -> None:
    """A request from a page of another site is refused by its Origin or what the browser says of it."""
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://localhost:{site.port + 1}"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
    ):
        assert site.ask("GET", "/", **headers).status == 403, headers
        assert site.ask("GET", "/events", **headers).status == 403, headers
    key = keys(site)["delete"]
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "", "sec_fetch_site": "cross-site"},
        {"origin": "null"},
    ):
        assert site.post("/delete", {"id": "bad", "key": key}, **headers).status == 403
    # A link elsewhere may lead here: nothing is changed by looking.
    assert site.ask("GET", "/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200
    assert site.store.get_run("bad") is not None


def test_every_answer_has_its_policy(site: Site) -> None:
    """No answer may load from elsewhere, run what stands in the page, be framed, guessed at or kept."""
    requests = [
        *PAGES,
        "/static/ui.js",
        "/static/ui.css",
        "/nope",
        "/run?id=nope",
        "/attempt",
        *attempts_of(site),
    ]
    answers = [site.ask("GET", path) for path in requests]
    answers += [site.ask("GET", "/", host="evil.example"), site.post("/delete", {}), site.ask("PUT", "/")]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "server" not in answer.headers or "uvicorn" in answer.headers["server"]


def test_pages_keep_to_the_policy(site: Site) -> None:
    """Pages have no script, style or handler in them, and name no other site."""
    for path in (*PAGES, *attempts_of(site), "/run?id=nope"):
        page = Page(site.ask("GET", path).text)
        assert page.style == ""
        assert page.tags.count("script") == 1
        for name, value in page.attributes:
            assert not name.startswith("on")
            assert name != "style"
            if name in ("href", "src", "action"):
                assert str(value).startswith(("/", "#")), value
                assert not str(value).startswith("//"), value


TOKEN = "a secret of 20 chars"


def with_token(store: SQLiteStore, serve: Any) -> Site:
    """A site with a token, which also answers by a name of its own: ``own.localhost``."""
    make_runs(store, ("good", GOOD))
    listening = serve.listening()
    port = listening.getsockname()[1]
    hosts = [f"127.0.0.1:{port}", f"proxy.example:{port}", f"own.localhost:{port}"]
    site: Site = serve(
        store, listening=listening, token=TOKEN, hosts=hosts, private_host=f"own.localhost:{port}"
    )
    return site


@pytest.mark.core
def test_the_token(store: SQLiteStore, serve: Any) -> None:
    """With a token nothing is told without it; shown once, it becomes a cookie and leaves the address."""
    site = with_token(store, serve)
    own = f"own.localhost:{site.port}"
    for host in (site.host, own):
        for path in (*PAGES, "/events", "/static/ui.js", "/?token=wrong", "/?token=", "/run?id=good&token=a"):
            answer = site.ask("GET", path, host=host)
            assert answer.status == 401, path
            assert b"flows" not in answer.body
            assert answer.headers["www-authenticate"].startswith("Basic ")
    assert site.ask("GET", "/", authorization=f"Bearer {TOKEN}").status == 200
    assert site.ask("GET", "/", authorization="Bearer wrong").status == 401
    shown = site.ask("GET", f"/run?id=good&token={TOKEN.replace(' ', '+')}", host=own)
    assert shown.status == 303
    assert shown.headers["location"] == "/run?id=good"
    cookie = shown.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Domain" not in cookie
    assert "secret" not in cookie
    entry = cookie.partition(";")[0]
    assert site.ask("GET", "/run?id=good", cookie=entry, host=own).status == 200
    for wrong in (f"{entry}x", entry.replace("=", "=0"), "stroma_ui=", "stroma_ui", "\x00"):
        assert site.ask("GET", "/", cookie=wrong, host=own).status in (400, 401), wrong
    # Nobody is sent to another host with it.
    away = site.ask("GET", "//evil.example/?token=a%20secret%20of%2020%20chars", host=own)
    assert away.headers["location"] == "/evil.example/"


def test_the_cookie_is_for_one_server(store: SQLiteStore, serve: Any) -> None:
    """Under a name that other servers of this machine have too, there is no cookie, and none is taken."""
    site = with_token(store, serve)
    own = f"own.localhost:{site.port}"
    shown = site.get("/run", id="good", token=TOKEN)
    assert shown.status == 303
    assert "set-cookie" not in shown.headers
    assert shown.headers["location"] == f"http://{own}/run?id=good&token=a+secret+of+20+chars"
    entry = (
        site.ask("GET", f"/?token={TOKEN.replace(' ', '+')}", host=own)
        .headers["set-cookie"]
        .partition(";")[0]
    )
    assert site.ask("GET", "/", cookie=entry).status == 401
    for host in (site.host, f"proxy.example:{site.port}", own):
        for shown_as in (f":{TOKEN}", f"ada:{TOKEN}"):
            credentials = base64.b64encode(shown_as.encode()).decode()
            assert site.ask("GET", "/", authorization=f"Basic {credentials}", host=host).status == 200
        for wrong in ("x", "", base64.b64encode(b"ada:wrong").decode(), base64.b64encode(b"\xff").decode()):
            assert site.ask("GET", "/", authorization=f"Basic {wrong}", host=host).status == 401
    # Elsewhere there is no name of this machine to lead to.
    proxied = site.ask("GET", f"/?token={TOKEN.replace(' ', '+')}", host=f"proxy.example:{site.port}")
    assert (proxied.status, proxied.headers["location"]) == (303, "/")
    assert "set-cookie" not in proxied.headers


@pytest.mark.parametrize(
    "origin", ["http://[::1", "https://[", "//", "evil", "http://127.0.0.1:x", "http://"]
)
def test_a_bad_origin_is_refused_first(site: Site, origin: str) -> None:
    """An Origin that is none is 403, whatever else is wrong with the request."""
    for method, host in (
        ("GET", site.host),
        ("POST", site.host),
        ("PUT", site.host),
        ("GET", "evil.example"),
    ):
        assert site.ask(method, "/", origin=origin, host=host).status == 403


def test_frames_of_other_sites_are_refused(site: Site) -> None:
    """Another site can lead here, but cannot show our pages in a frame nor hold a stream open."""
    elsewhere = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    for dest in ("iframe", "frame", "embed", "object", "fencedframe"):
        assert site.ask("GET", "/", sec_fetch_dest=dest, **elsewhere).status == 403
        assert site.ask("GET", "/events", sec_fetch_dest=dest, **elsewhere).status == 403
    assert site.ask("GET", "/", sec_fetch_dest="document", **elsewhere).status == 200
    assert site.ask("GET", "/events", sec_fetch_dest="document", **elsewhere).status == 403


def _stream(site: Site, path: str) -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", site.port), timeout=60)
    opened.sendall(f"GET {path} HTTP/1.1\r\nHost: {site.host}\r\n\r\n".encode())
    return opened


def test_streams_are_bounded(store: SQLiteStore, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pages as may be are served, one more is told so; what no page watches any more is forgotten."""
    outputs: list[Events] = []
    init = Events.__init__
    monkeypatch.setattr(Events, "__init__", lambda self, *of: (outputs.append(self), init(self, *of))[1])
    site: Site = serve(store)
    (events,) = outputs
    held = [_stream(site, "/events")]
    assert held[0].recv(100)
    for number in range(20):
        with _stream(site, f"/events?id={number}{'a' * 5_000}") as one:
            assert one.recv(20).startswith(b"HTTP/1.1 200")
    held += [_stream(site, f"/events?id={number}") for number in range(80)]
    reports = [one.recv(12) for one in held[1:]]
    assert reports.count(b"HTTP/1.1 503") >= 31
    for one in held:
        one.close()
    until = time.monotonic() + 60
    while (events._open or events._watched) and time.monotonic() < until:
        time.sleep(0.02)
    assert (events._open, events._watched) == (0, {})


def _connect(site: Site, sent: str = "") -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", site.port), timeout=30)
    opened.sendall(sent.format(host=site.host).encode())
    return opened


def test_a_form_has_a_time_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form whose body does not arrive is refused, and its connection closed."""
    monkeypatch.setattr("stroma.ui.actions._FORM_SECONDS", 0.2)
    head = (
        "POST /delete HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\nContent-Type: "
        "application/x-www-form-urlencoded\r\n\r\nid="
    )
    with _connect(site, head) as slow:
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_marks_of_direction_are_shown(store: SQLiteStore, serve: Any) -> None:
    """What would make a page read as something else is shown as an escape, on every page."""
    turned = "invoice\u202egnp.exe"

    async def fails(state: State) -> Any:
        raise ValueError(turned)

    make_runs(store, (turned, Pipeline(turned, [node(turned, fails)])), state=State(text=turned))
    site = serve(store)
    pages = ["/", "/overview", f"/run?{urlencode({'id': turned})}", *attempts_of(site, turned)]
    assert len(pages) > 3
    for path in pages:
        text = site.ask("GET", path).text
        assert "\u202e" not in text, path
        assert "invoice\\u202egnp.exe" in text, path


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_a_token_by_default(tmp_path: Path, own: bool) -> None:
    """`stroma ui` makes a token and prints an address that has it, under a name of this server alone."""
    env = os.environ | ({"STROMA_UI_TOKEN": TOKEN} if own else {})
    with SQLiteStore(tmp_path / "x.db") as store:
        make_runs(store, ("good", GOOD))
    command = [str(Path(sys.executable).with_name("stroma")), "ui", "--db", "x.db", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        printed = process.stdout.readline().strip()
        name, port, token = re.findall(
            r"http://(stroma-[0-9a-f]{16}\.localhost):(\d+)/\?token=(\S+)", printed
        )[0]
        site = Site(int(port), None)
        assert site.get("/").status == 401
        if own:
            assert (token, printed.count(TOKEN)) == ("...", 0)
            token = TOKEN
        assert len(token) >= 16
        shown = site.ask("GET", f"/?{urlencode({'token': token})}", host=f"{name}:{port}")
        assert shown.status == 303
        cookie = shown.headers["set-cookie"].partition(";")[0]
        assert site.ask("GET", "/", host=f"{name}:{port}", cookie=cookie).status == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *(
            (("--host", host), "can be reached from other machines")
            for host in ("0.0.0.0", "::", "192.0.2.1")
        ),
        (("--host", "example.org"), "can be reached from other machines"),
        (("--host", "0.0.0.0", "--token", "short"), "must have at least 16 characters"),
    ],
)
def test_other_addresses_need_a_token(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listening where others can connect is refused without a token, and with one that could be guessed."""
    with undone_command():
        assert main(["ui", *words, "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert (out, expected in err, "token" in err) == ("", True, True), err


@pytest.mark.core
def test_forms_carry_a_key(site: Site) -> None:
    """Deleting and resuming need the key that stands on the run's own page, for that very action and run."""
    result = keys(site)
    assert set(result) == {"resume", "delete"}
    for action in ("resume", "delete"):
        other = result["delete" if action == "resume" else "resume"]
        for key in ("", "x", other, keys(site, "good")["delete"], result[action][:-1], "é"):
            assert site.post(f"/{action}", {"id": "bad", "key": key}).status == 403, (action, key)
        assert site.get(f"/{action}", id="bad", key=result[action]).status == 405
        json_form = site.post(f"/{action}", {"id": "bad", "key": result[action]}, content_type="text/plain")
        assert json_form.status == 415
    assert site.post("/delete", {"id": "bad", "key": "x" * 200_000}).status == 413
    assert site.resumed == []
    assert site.store.get_run("bad") is not None

    answer = site.post("/resume", {"id": "bad", "key": result["resume"]})
    assert (answer.status, site.resumed) == (303, ["bad"])
    assert answer.headers["location"] == "/run?id=bad&started=yes"
    answer = site.post("/delete", {"id": "bad", "key": result["delete"]})
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert site.store.get_run("bad") is None
    assert site.post("/delete", {"id": "bad", "key": result["delete"]}).status == 404


def test_only_what_can_be_resumed(store: SQLiteStore, serve: Any) -> None:
    """Without a pipeline nothing is resumed; with one only its own runs that have not ended well."""
    make_runs(store, ("good", GOOD), ("bad", BAD), ("last", BAD), ("other", Pipeline("other", BAD.nodes)))
    site = serve(store, pipeline="flows")
    assert "resume" not in keys(site, "good")
    assert "resume" not in keys(site, "last")
    assert "resume" not in keys(site, "other")
    assert "resume" in keys(site, "bad")
    without = serve(store, resume=None)
    assert "resume" not in keys(without, "bad")
    # Whoever has the key all the same is told so.
    from stroma.ui.security import Keys

    assert Keys(secret=b"1").form("resume", "x") != Keys(secret=b"2").form("resume", "x")


def test_scripts_are_words(site: Site) -> None:
    """Markup in ids, tags, messages, states and queries is text in every page."""
    run_id = f"{SCRIPT}/../?#%00&x=1\n\u202e"
    make_runs(site.store, (run_id, Pipeline(SCRIPT, BAD.nodes)))
    pages = [
        site.get("/"),
        site.get("/", q=SCRIPT),
        site.get("/", q=f"tag:{SCRIPT} node:{SCRIPT}"),
        site.get("/run", id=run_id),
        site.get("/run", id=SCRIPT),
        site.get("/", status=SCRIPT),
        site.get("/", after=SCRIPT),
        *(site.ask("GET", address) for address in attempts_of(site, run_id)),
    ]
    assert [page.status for page in pages].count(200) >= 10
    for page in pages:
        text = page.text
        assert "<script>window" not in text
        assert "<img" not in text
        assert Page(text).tags.count("script") == 1
    assert site.get("/run", id=run_id).status == 200


@pytest.mark.core
def test_fifty_megabytes(store: SQLiteStore, serve: Any) -> None:
    """A payload of 50 MB makes no page large; it can be downloaded whole."""

    grow = computing(lambda _: {"text": "x" * 50_000_000})
    again = stroma_node("again", input=Note, output=Note)(lambda state: state)
    pipeline = Pipeline("big", [stroma_node("grow", input=Note, output=Note)(grow), again])
    asyncio.run(StromaRunner.quick(store=store).run(pipeline, Note(), run_id="big"))
    site = serve(store)
    for path in ("/", "/run?id=big", *attempts_of(site, "big")):
        answer = site.ask("GET", path)
        assert answer.status == 200
        assert len(answer.body) < 100_000
    page = site.ask("GET", attempts_of(site, "big")[0]).text
    assert "too large to show" in page
    address = re.findall(r'href="(/payload[^"]*output)"', page)[0].replace("&amp;", "&")
    answer = site.ask("GET", address)
    assert len(answer.body) > 50_000_000
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.slow
def test_a_run_of_many_attempts(tmp_path: Path, serve: Any) -> None:
    """A run of 20,000 attempts is shown a page at a time, and each attempt can be opened."""
    path = tmp_path / "large.db"
    large_stores.fill(f"sqlite:///{path}", 1, 20_000)
    with SQLiteStore(path) as store:
        site = serve(store)
        first = site.get("/run", id="run-000000")
        assert first.status == 200
        assert len(first.body) < 2_500_000
        further = re.findall(r'rel="next" href="([^"]*)"', first.text)[0].replace("&amp;", "&")
        second = site.ask("GET", further)
        assert ">n500<" in second.text
        assert site.ask("GET", attempts_of(site, "run-000000")[3]).status == 200
        assert site.get("/").status == 200


@pytest.mark.core
def test_damaged_rows(site: Site, tmp_path: Path) -> None:
    """Rows that hold anything at all harm no other page: what cannot be read is said to be so."""
    with sqlite3.connect(tmp_path / "runs.db") as db:
        db.execute(
            "UPDATE steps SET output = x'ff00', sha256 = x'00' WHERE run = (SELECT run FROM runs WHERE "
            "run_id = 'bad')"
        )
        db.execute(
            "UPDATE runs SET started_ms = 9223372036854775807, pipeline = char(27, 8238, 0xd800) WHERE "
            "run_id = 'bad'"
        )
        db.execute("UPDATE attempts SET message = char(0xfffe), model = '' WHERE node_id = 'flaky'")
    db.close()
    assert site.get("/").status == 200
    assert site.get("/run", id="bad").status == 200
    addresses = attempts_of(site)
    assert len(addresses) >= 6
    for address in addresses:
        assert site.ask("GET", address).status == 200
    assert "is damaged" in site.ask("GET", addresses[0]).text
    assert site.get("/run", id="good").status == 200


def test_what_is_asked_wrongly(site: Site) -> None:
    """Whatever is asked is answered with a page of its own, never with a traceback."""
    wrong = words("""
        /run /run?id= /run?id=%00 /run?id=%ff /run?id=last /attempt?id=bad /attempt?id=bad&at=-1&began=1
        /attempt?id=bad&at=99999999999999&began=1 /attempt?id=bad&at=0&began=x
        /payload?id=bad&at=0&began=1&side=x /export?id=bad&format=x /?after=x /?after=9.9.9
        /run?id=bad&after=x /?status=x /static/../app.py /static/%2e%2e/app.py /static/ /nope
        /?class=x /overview?days=x
    """)
    for path in wrong:
        answer = site.ask("GET", path)
        assert 400 <= answer.status < 500, (path, answer.status)
        assert "Traceback" not in answer.text
    assert site.ask("GET", "/" + "?q=" + "x" * 20_000).status == 200


def test_redaction(store: SQLiteStore, serve: Any) -> None:
    """What the pipeline's redact takes out is in no page and no download."""
    make_runs(store, ("bad", BAD))
    site = serve(store, redact=lambda state: {**state, "text": "***", "n": "***"})
    bare = serve(store)
    for address in attempts_of(site)[:2]:
        page, plain = site.ask("GET", address).text, bare.ask("GET", address).text
        assert "onerror" in plain.partition("<h2>Input</h2>")[2]
        assert "onerror" not in page.partition("<h2>Input</h2>")[2]
        for side in ("input", "output"):
            answer = site.ask("GET", address.replace("/attempt", "/payload") + f"&side={side}")
            assert b"onerror" not in answer.body
    exported = site.get("/export", id="bad", format="html").text
    assert exported.count("***") >= 4


async def _tells(state: Any) -> Any:
    raise ValueError(f"cannot bill {state.text!r}: no card of {state.text[:20]}... is left")


async def _asks(state: Any) -> Any:
    raise Suspend(f"may {state.text} be billed?")


@pytest.mark.core
def test_messages_are_redacted(store: SQLiteStore, serve: Any) -> None:
    """What redact removes from a state is in no recorded message or question, on no page and in no file."""

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "text": "***"} if "text" in state else state

    secret = "Augusta Ada King, Countess of Lovelace"
    one = Pipeline("flows", [node("first", passing()), node("bills", _tells)])
    runs = ("bad", one), ("waits", Pipeline("flows", [node("asks", _asks)]))
    make_runs(store, *runs, state=State(text=secret), redact=hide)
    make_runs(store, ("good", GOOD))
    site = serve(store, redact=hide)
    requests = [
        "/",
        "/?status=failed",
        "/run?id=bad",
        *attempts_of(site, "bad"),
        "/run?id=waits",
        "/export?id=bad&format=html",
    ]
    for path in requests:
        page = site.ask("GET", path)
        assert page.status == 200, path
        assert "Ada King" not in page.text, path
    text = html.unescape(site.get("/run", id="bad").text)
    assert "cannot bill '[redacted]': no card of [redacted]... is left" in text
    # Nor can it be guessed, word by word.
    assert 'href="/run?id=bad"' not in site.get("/", q="Countess").text
    assert 'href="/run?id=bad"' in site.get("/", q="cannot bill").text
