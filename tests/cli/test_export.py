"""`stroma export`: in the formats of other tools, and as one HTML file."""

import base64
import hashlib
import json

import pytest
from tests.trace.standalone_pages import check_page

GOOD = '{"start": 1}'
FLOWS = """
    from sums import *
    class Total(BaseModel):
        lines: list[dict[str, int]]
    async def flaky(state):
        if current_node().attempt == 1:
            current_node().report_usage(input_tokens=50, model="gpt-4o-mini")
            raise TimeoutError("<script>alert(1)</script> & ]]> \\x1b[31m 'quoted\\"")
        return {"n": 2}, 10, 5, "gpt-4o-mini"
    async def left(state):
        await asyncio.sleep(0.02)
        return {"n": 5}
    async def breaks(state):
        return {"lines": [{"price": "many"}]}, 20, 20, "gpt-4o-mini"
    pipeline = Pipeline("flows", [
        node("<first>", add_one, Count), node("flaky", flaky),
        parallel(node("left", left), node("right", left)),
        node("total", breaks, Sum, Total)], config=RunConfig(policy_map=quick))
"""


@pytest.fixture
def failed(any_url, stroma, inside, monkeypatch, ran):
    """A run with a retry, a group and a broken contract, in a store of every kind."""
    monkeypatch.setenv("STROMA_DB", any_url)
    stroma.file("flows.py", FLOWS)
    ran("x", "--tag", "t", target="flows.py:pipeline", code=1)


def test_json(failed, inside):
    """json has the run, its input and every attempt with its output; --no-states leaves states out."""
    data = json.loads(inside("export", "x").out)
    assert (data["schema"], data["run"]["run_id"], data["input"]) == ("stroma.export/1", "x", {"n": 1})
    events = [(a["node_id"], a["branch"], a["attempt"], a["output"]) for a in data["attempts"]]
    assert events == [
        ("<first>", "", 1, {"n": 2}),
        ("flaky", "", 1, None),
        ("flaky", "", 2, {"n": 2}),
        ("parallel(left, right)", "", 1, {"n": 5}),
        ("left", "0", 1, {"n": 5}),
        ("right", "1", 1, {"n": 5}),
        ("total", "", 1, None),
    ]
    bare = json.loads(inside("export", "x", "--no-states").out)
    assert bare["input"] is None
    assert "output" not in bare["attempts"][0]


def test_html(failed, inside, stroma):
    """html is one file that loads nothing: the cause with its field, a bar for each attempt, the states."""
    done = inside("export", "x", "--format", "html", "-o", "x.html")
    assert (done.code, done.out) == (0, "")
    path = stroma.home / "x.html"
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    page = check_page(text)
    policy = (
        dict(page.attributes)["content"]
        if False
        else next(v for k, v in page.attributes if k == "content" and "default-src" in v)
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert text.count('<rect class="b-failure') == 2
    assert text.count('<rect class="b-success') == 5
    assert text.count('<rect class="b-wait') == 1
    assert "<b>Field</b> <code>lines.0.price</code>" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<code>stroma resume x flows.py:pipeline" in text
    bare = inside("export", "x", "--format", "html", "--no-states").out
    check_page(bare)
    assert "<h2>Attempts</h2>" in bare
    assert '<span class="key">n</span>' in text
    assert '<span class="key">n</span>' not in bare


@pytest.mark.core
def test_what_a_pipeline_redacts(stroma, inside, ran):
    """--redact hides in states what the pipeline's config hides; a redact that raises hides all."""
    stroma.file(
        "private.py",
        """
        from sums import *
        async def secret(state):
            return {"n": 471147114711}
        def hide(state):
            return {**state, "n": "hidden"}
        def broken(state):
            raise ValueError
        nodes = [node("first", add_one, Count), node("secret", secret)]
        pipeline = Pipeline("private", nodes, config=RunConfig(redact=hide))
        other = Pipeline("private", nodes, config=RunConfig(redact=broken))
    """,
    )
    ran("x", target="private.py:pipeline")
    assert "471147114711" in inside("show", "x", "--output").out
    for target in ("private.py:pipeline", "private.py:other"):
        for words in (
            ["show", "x", "--input", "--output"],
            ["show", "x", "--output", "--json"],
            ["export", "x"],
            ["export", "x", "--format", "html"],
            ["diff", "x", "x", "--json"],
        ):
            done = inside(*words, "--redact", target)
            assert done.code == 0, done
            assert "471147114711" not in done.out
    assert "hidden" in inside("export", "x", "--format", "html", "--redact", "private.py:pipeline").out


def test_messages_are_redacted(stroma, inside, ran):
    """Messages are recorded without what the config's redact removes from states, whatever shows them."""
    stroma.file(
        "private.py",
        """
        from sums import *
        async def secret(state):
            raise ValueError(f"no card of {state.n}")
        def hide(state):
            return {**state, "n": "hidden"}
        nodes = [node("first", add_one, Count), node("secret", secret)]
        pipeline = Pipeline("private", nodes, config=RunConfig(redact=hide))
    """,
    )
    value = '{"start": 471147114711}'
    ran("x", target="private.py:pipeline", given=value, code=1)
    inside("run", "private.py:pipeline", value, "--run-id", "y", "-q")
    for words in (
        ["show", "x"],
        ["show", "x", "--json"],
        ["runs"],
        ["runs", "--json"],
        ["tail", "x"],
        ["tail"],
        ["tail", "x", "--json"],
        ["export", "x", "--no-states"],
        ["export", "x", "--format", "html", "--no-states"],
        ["diff", "x", "y", "--json"],
    ):
        done = inside(*words)
        assert "no card of [redacted]" in done.out.replace("\n", " "), words
        assert "47114712" not in done.out, words
    assert "no run matches" in inside("runs", "--search", "47114712").err


def test_a_file_that_cannot_be_written(stroma, inside, fails):
    """An output that cannot be written is 3 and names the file; one that is there is replaced."""
    assert inside("run", "sums.py:pipeline", GOOD, "-q").code == 0
    done = inside("export", "last", "-o", "no/such/x.json")
    fails(done, 3, "cannot write no/such/x.json", "pass another file")
    stroma.file("x.json", "something much longer than what comes" * 1000)
    assert inside("export", "last", "-o", "x.json").code == 0
    assert json.loads((stroma.home / "x.json").read_text())["schema"] == "stroma.export/1"
