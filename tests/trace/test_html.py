"""A run as HTML and in a terminal: what a notebook shows, and the file to attach to a bug report."""

import html
import itertools
import json
import re
import stat
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, field_validator
from tests.kit import passing, returning
from tests.tiers import examples
from tests.trace.standalone_pages import check_page

from stroma import FailurePolicy, StromaRunner, current_node, parallel, stroma_node
from stroma._utils.hiding import without
from stroma.trace.html import document, fragment, tree
from stroma.trace.redaction import forms_to_hide
from stroma.trace.story import Bar, StopCause, Story, fields_named, waits
from stroma.trace.timeline import Timeline, idle_ms, places

HOSTILE = "<script>alert(1)</script>\"'&amp;]]><!--\x00\x1b[31m\u202e</pre></style>"


class State(BaseModel):
    n: int = 0
    text: str = HOSTILE


class Total(BaseModel):
    lines: list[dict[str, int]]


def node(node_id: str, func: Any, output: type[BaseModel] = State) -> Any:
    return stroma_node(node_id, input=State, output=output)(func)


async def flaky(state: Any) -> Any:
    if current_node().attempt == 1:
        raise TimeoutError(HOSTILE)
    return {"n": 1}, 1000, 200, "gpt-4o-mini"


async def one(state: Any) -> Any:
    return {"n": state.n + 1}


async def breaks(state: Any) -> Any:
    return {"lines": [{"price": HOSTILE}]}


@pytest.fixture
async def failed() -> Any:
    """A retry, a group, and a contract that was broken deep inside."""
    quick = FailurePolicy(max_retries=1, backoff_seconds=0.01, jitter=False)
    runner = StromaRunner.quick(policy_map={"RECOVERABLE": quick})  # type: ignore[dict-item]
    group = parallel(node("left", one), node(HOSTILE.replace("\x00", ""), one))
    return await runner.run([node("flaky", flaky), group, node("total", breaks, Total)], State())


async def test_a_result_as_a_page(failed: Any) -> None:
    """The page has a bar for each attempt and wait, the cause with its field, and each state; no script."""
    text = failed.to_html()
    check_page(text)
    assert text.count('<rect class="b-failure') == 2
    assert text.count('<rect class="b-success') == 4
    assert text.count('<rect class="b-wait') == 1
    # The timeline of the web pages, in their tokens, for elements of this page alone.
    assert 'class="row axis"' in text
    assert text.count("--accent:#") == 2
    assert "<style>.stroma{" in text
    assert "TERMINAL (contract)" in text
    assert "<b>Field</b> <code>lines.0.price</code>" in text
    assert text.count('class="attempt"') == 6
    assert "&lt;script&gt;alert(1)" in text
    assert re.search(r"spent</b> 1,200 tok, \$0\.00027", text)
    # The attempt that failed is the one that is marked.
    (marked,) = re.findall(r'<rect class="b-(\w+) b-on"', text)
    assert marked == "failure"
    check_page(failed._repr_html_())
    check_page(failed.trace._repr_html_())
    assert failed._repr_html_().startswith('<div class="stroma">')


async def test_a_file_for_a_bug_report(failed: Any, tmp_path: Path) -> None:
    """to_html() of a trace writes one file, for its owner alone, and returns what is in it."""
    path = tmp_path / "bug.html"
    text = failed.trace.to_html(path)
    assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check_page(text).tags.count("svg") >= 4


async def test_secrets_and_redaction() -> None:
    """Secrets are masked, what redact takes out is not there, and a redact that raises leaves no state."""

    class Private(BaseModel):
        key: SecretStr = SecretStr("hunter2")
        name: str = "Ada Lovelace"

    nodes = [stroma_node("keep", input=Private, output=Private)(passing())]
    result = await StromaRunner.quick().run(nodes, Private())
    assert "Ada Lovelace" in result.to_html()
    assert "hunter2" not in result.to_html()
    assert "Ada" not in result.to_html(redact=lambda state: {**state, "name": "***"})

    class Quoting(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def _no_names(cls, value: str) -> str:
            raise ValueError(f"{value} is a person")

    nodes = [stroma_node("quotes", input=Private, output=Quoting)(returning({"name": "Ada Lovelace"}))]
    failed = await StromaRunner.quick().run(nodes, Private(name="x"))
    assert "Ada" in failed.to_html()
    hidden = failed.to_html(redact=lambda state: {})
    assert "Ada" not in hidden
    assert "<code>name</code>" in hidden
    assert "Ada" not in result.trace.to_html(redact=lambda state: 1 / 0)  # type: ignore[arg-type, return-value]


@pytest.mark.core
async def test_messages_are_redacted(tmp_path: Path) -> None:
    """What redact takes out of a state is not in a message, whole or cut, and no other word is lost."""

    class Private(BaseModel):
        name: str = "Augusta Ada King, Countess of Lovelace"
        age: int = 36

    async def bills(state: Any) -> Any:
        raise ValueError(f"cannot bill {state.name[:25]}... or {json.dumps(state.name)} at {state.age}")

    nodes = [stroma_node("bills", input=Private, output=Private)(bills)]
    result = await StromaRunner.quick().run(nodes, Private())

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "name": "***"} if "name" in state else state

    for shown in (result, result.trace):
        text = html.unescape(shown.to_html(redact=redact))
        assert "Ada King" not in text
        assert 'cannot bill [redacted]... or "[redacted]" at 36' in text
        assert "Ada King" in shown.to_html()


_SECRET = 'Zoë\'s "key" p@ss/w\\ord\nof 2'


@pytest.mark.core
@pytest.mark.parametrize(
    "form",
    [
        str.upper,
        str.title,
        repr,
        ascii,
        json.dumps,
        html.escape,
        quote,
        quote_plus,
        lambda value: json.dumps(value, ensure_ascii=False),
        lambda value: json.dumps(json.dumps([value])),
        lambda value: repr(value.encode()),
        lambda value: quote(value, safe=""),
        lambda value: value.encode().hex(),
        *(
            lambda value, before=n: b64encode(b"user:x"[before:] + value.encode() + b"!").decode()
            for n in range(3)
        ),
        *(
            lambda value, before=n: urlsafe_b64encode(b"user:x"[before:] + value.encode()).decode()
            for n in range(3)
        ),
    ],
)
def test_other_forms_of_what_is_hidden(form: Any) -> None:
    """A hidden value is in no message in any notation: in other case, quoted, in a URL, in base64, in hex."""
    hidden = forms_to_hide([_SECRET])
    message = form(_SECRET)
    left = without(f"the server at n=1 says {message}: no", hidden)
    assert left.startswith("the server at n=1 says ")
    assert left.endswith(": no")
    assert "[redacted]" in left
    # Nothing is left that tells more than how it was written.
    assert len(left.replace("[redacted]", "")) < len("the server at n=1 says : no") + 24
    parts = [message[at : at + 8] for at in range(8, len(message) - 16)]
    assert not [part for part in parts if part in left]


@pytest.mark.core
def test_hidden_values_that_begin_alike() -> None:
    """Of two hidden values that begin alike, each is hidden to its end, also where it is cut off."""
    urls = ["https://example.com/reset/ada-4f2a", "https://example.com/reset/grace-91"]
    for text in (f"no: {urls[0]} or {urls[1]}.", f"no: {urls[1]} or {urls[0]}."):
        assert without(text, urls) == "no: [redacted] or [redacted]."
    assert without(f"no: {urls[0][:-2]}...", urls) == "no: [redacted]..."
    scrubbed = without("redacted is Redacted", ["redacted", "https://example.com/reset/"])
    assert scrubbed == "[redacted] is [redacted]"
    assert without("İ Ada Lovelace İ", ["ada lovelace"]) == "İ [redacted] İ"


words = st.text(max_size=40) | st.sampled_from([HOSTILE, "a: b", "{x}", "javascript:alert(1)"])
json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.core
@examples(60)
@given(words, words, words, json_data)
def test_no_text_is_ever_markup(one: str, two: str, three: str, state: Any) -> None:
    """Whatever a run holds, its page has the elements that it has for plain words."""

    def story(a: str, b: str, c: str, held: Any) -> Story:
        bars = [
            Bar(a, "0", 1, 0, 5, "failure", "TERMINAL", b, c, 3, 1, 0.1, b, False, held, None),
            Bar(a, "0", 2, 9, 5, "success", None, None, None, 3, 1, 0.1, b, True, held, held),
        ]
        return Story(
            a, b, "FAILED", bars, 3, 0.1, 1, 2.0, StopCause(a, "0", 1, "TERMINAL", c, b, a), ((a, b),)
        )

    def shape(text: str) -> list[str]:
        return check_page(text).tags

    plain = story("a", "b", "c", None)
    instance = story(one or "x", two or "x", three or "x", None)
    assert shape(document(instance)) == shape(document(plain))
    check_page(document(story(one, two, three, state)))
    check_page(fragment(story(one, two, three, state)))


def test_what_is_too_much_to_show() -> None:
    """A payload of any size, depth or width makes a page of bounded size, which says what it leaves out."""
    long = "x" * 50_000_000
    assert len(tree({"text": long})) < 10_000
    assert "more characters" in tree({"text": long})
    wide = tree([{"n": i} for i in range(1_000_000)])
    assert len(wide) < 200_000
    assert "999," in wide
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert len(tree(deep)) < 20_000
    bars = [Bar(f"n{i}", str(i), 1, i, 1, "success") for i in range(100_000)]
    bars[99_000] = Bar("bad", "99000", 1, 99_000, 1, "failure", "TERMINAL", None, "no")
    text = fragment(Story("r", "p", "FAILED", bars, 0, 0.0), states=False)
    assert len(text) < 2_000_000
    assert "and 98,000 attempts more" in text
    assert ">bad<" in text or "bad</span>" in text


@pytest.mark.core
def test_waits_are_between_attempts_of_one_place() -> None:
    """A wait begins where an attempt ended and ends where the next at its place begins, without overlaps."""
    bars = [
        Bar("a", "0", 1, 0, 10, "failure"),
        Bar("a", "0", 2, 25, 10, "failure"),
        Bar("a", "0", 3, 30, 10, "success"),
        Bar("b", "1", 1, 100, 10, "success"),
    ]
    assert [(bar.attempt, began, took) for bar, began, took in waits(bars)] == [(2, 10, 15)]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (
            "Contract violation for 'x' (output): total: wrong; lines.0.price: bad; ... and 3 more",
            ["total", "lines.0.price"],
        ),
        ("Contract violation for 'a (b): c' (input): n: wrong", ["n"]),
        ("Contract violation for 'x' (output): Value error, it: no", []),
        ("something: else", []),
    ],
)
def test_fields_that_a_message_names(message: str, fields: list[str]) -> None:
    """The paths of a broken contract are read from its message, and from no other."""
    assert fields_named(message) == fields


@pytest.mark.parametrize(("side", "other"), [("input", "output"), ("output", "input")])
def test_a_field_is_marked_on_the_side_that_broke(side: str, other: str) -> None:
    """Whatever words the id of the node and the complaint have."""
    message = f"ContractViolation: Contract violation for 'a ({other})' ({side}): n: no ({other})"
    bar = Bar("a", "0", 1, 0, 10, "failure", message=message, input_state={"n": 1}, output_state={"n": 2})
    page = document(Story("run", "pipeline", "FAILED", [bar], 0, 0.0))
    marked = re.findall(r'<li class="broke"><span class="key">n</span>: (\d)', page)
    assert marked == [str(("input", "output").index(side) + 1)]


def test_groups_fold() -> None:
    """Children of a group are folded away, unless the attempt that is selected is among them."""
    bars = [
        Bar("group", "0", 1, 0, 10, "failure"),
        Bar("child", "0.0", 1, 0, 10, "failure"),
        Bar("child", "0.1", 1, 0, 10, "success"),
    ]
    story = Story("r", "p", "FAILED", bars, 0, 0.0)
    assert "<details><summary" in Timeline(story, None).draw()
    assert "<details open><summary" in Timeline(story, None, selected=bars[1]).draw()


@pytest.mark.core
def test_idle_time_folds() -> None:
    """A stretch in which nothing ran is drawn as a short one; order and scale of work stay."""
    bars = [
        Bar("a", "0", 1, 0.0, 1000.0, "failure", "AMBIGUOUS"),
        Bar("a", "0", 2, 61_000.0, 500.0, "success"),
        Bar("b", "1", 1, 61_500.0, 500.0, "success"),
        Bar("c", "2", 1, 4_000_000.0, 1000.0, "success"),
    ]
    assert idle_ms(bars) == 60_000 + 3_938_000
    story = Story("r", "p", "COMPLETED", bars, 0, 0.0)

    def drawn(**how: bool) -> list[tuple[float, float]]:
        text = Timeline(story, None, **how).draw()
        result = re.findall(r'<rect class="b-(?!wait)[^"]*" x="([\d.]+)%" y="5" width="([\d.]+)%"', text)
        return [(float(x), float(width)) for x, width in result]

    assert [width for _, width in drawn()] == [0.4] * 4  # The smallest.
    first, second, third, last = drawn(fold_idle=True)
    assert first[1] == pytest.approx(2 * second[1], abs=0.02) == pytest.approx(last[1], abs=0.02)
    assert second[1] > 10
    gap = second[0] - (first[0] + first[1])
    assert gap == pytest.approx(last[0] - (third[0] + third[1]), abs=0.03)
    assert 0 < gap < 4
    assert last[0] + last[1] == pytest.approx(100, abs=0.03)
    assert "waited 60.0 s" in Timeline(story, None, fold_idle=True).draw()
    assert idle_ms(bars[1:3]) == 61_000
    assert idle_ms([]) == 0


@given(
    spans=st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), max_size=8),
    times=st.lists(st.floats(0, 3e9), max_size=8),
)
def test_folded_time_goes_forward(spans: list[tuple[float, float]], times: list[float]) -> None:
    """Whatever is folded, no time is placed before an earlier one, nor further apart than it was."""
    place = places(spans)
    for a, b in itertools.pairwise(sorted(times)):
        assert -1e-3 <= place(b) - place(a) <= (b - a) * (1 + 1e-9) + 1e-3
