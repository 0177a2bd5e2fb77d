"""Outputs that broke their contract: stored with the attempt for people, and for nobody else."""

import asyncio
import json
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr
from tests.fixtures import store_fixture
from tests.kit import Num, Rot, SimpleStore, Text, computing, node, noting, quick, returning
from tests.shared_stores import FAMILIES

from stroma import NodeHooks, RunConfig, RunStatus, SQLiteStore, current_node_or_none, map_over
from stroma._utils.bounded_copy import BoundedCopy
from stroma.checkpoint.history.reader import History
from stroma.engine.commit import encode_rejected
from stroma.trace.rejected import MISSING, RecentOutputs, RejectedOutput, read_rejected

store = store_fixture(*FAMILIES)
LIMIT = 64 * 1024


class Rating(BaseModel):
    stars: int = Field(ge=1, le=5)
    why: str
    key: SecretStr | None = None


BAD = {"stars": "five", "notes": ["a", "é\ud800"]}


def rate(answers: list[Any]) -> Any:
    """Return a node that answers with one after the other."""
    left = iter(answers)

    answer = computing(lambda _: next(left))
    return node("rate", answer, Num, Rating)


def rejected_outputs(store: Any, run_id: str, redact: Any = None) -> list[RejectedOutput | None]:
    """Return what is stored for each attempt of a run."""
    history = History(store, redact)
    attempts, _ = history.attempts(run_id, 100)
    return [history.rejected_of(run_id, one) for one in attempts]


async def stored(tmp_path: Path, answer: Any, **config: Any) -> RejectedOutput | None:
    """Return what SQLite has of one answer that is no Rating."""
    store = SQLiteStore(tmp_path / f"{len(list(tmp_path.glob('*.db')))}.db")
    result = await quick(store=store, **config).run([rate([answer])], Num(), run_id="r")
    assert result.status is RunStatus.FAILED
    assert (result.failure.reason if result.failure else None) == "contract"
    return rejected_outputs(store, "r")[0]


@pytest.mark.core
async def test_each_attempt_has_its_rejected_output(store: Any) -> None:
    """What broke its contract is stored with attempt and complaints until the run is deleted or restarted."""
    nodes = [rate([BAD, "no JSON {", {"stars": 9, "why": "x"}, {"stars": 4, "why": "x"}])]
    runner = quick(store=store, contract_retries={"rate": 3})
    assert (await runner.run(nodes, Num(), run_id="r")).status is RunStatus.COMPLETED
    first, second, third, last = rejected_outputs(store, "r")
    assert last is None
    assert first == RejectedOutput(
        BAD,
        False,
        (
            (("stars",), "Input should be a valid integer, unable to parse string as an integer"),
            (("why",), "Field required"),
        ),  # type: ignore[arg-type]
    )
    assert (first.at(("notes", 1)), first.at(("why",))) == ("é\ud800", MISSING)
    assert first.at(("notes", 2)) == MISSING
    assert (second.value, [one.path for one in second.complaints]) == ("no JSON {", [()])
    assert third.value == {"stars": 9, "why": "x"}
    assert store.rejected_of("nobody", 0, "", 0) is store.rejected_of("r", 0, "", 1) is None
    await runner.run([rate([{"stars": 4, "why": "x"}])], Num(), run_id="r")
    attempts = store.attempts("r")
    assert rejected_outputs(store, "r") == [None] * len(attempts)
    nodes = [rate([BAD])]
    await runner.run(nodes, Num(), run_id="gone")
    (attempt,) = store.attempts("gone")[:1]
    assert store.rejected_of("gone", 0, "", attempt.started_ns) is not None
    deleted = store.delete("gone")
    if deleted is not None:
        await deleted
    assert store.rejected_of("gone", 0, "", attempt.started_ns) is None


async def test_a_resume_keeps_rejected_outputs(store: Any) -> None:
    """A resumed run still has the rejected outputs of the processes before."""
    await quick(store=store).run([rate([BAD])], Num(), run_id="r")
    good = {"stars": 4, "why": "x"}
    result = await quick(store=store).run([rate([good])], Num(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED
    assert [one is not None for one in rejected_outputs(store, "r")] == [True, False]


async def test_children_items_and_effects_have_theirs(store: Any) -> None:
    """An item of a map and an effect whose output is unknown have rejected outputs, each at its place."""

    class Many(BaseModel):
        items: list[Num] = []
        rated: list[Rating] = []

    answer = computing(lambda state: {"stars": state.n, "why": "x"})
    runner = quick(store=store)
    each = map_over("items", node("rate", answer, Num, Rating), into="rated")
    await runner.run([each], Many(items=[Num(n=3), Num(n=7)]), run_id="map")
    found = [one.value for one in rejected_outputs(store, "map") if one is not None]
    assert found == [{"stars": 7, "why": "x"}]
    charge = runner.node("charge", input=Num, output=Rating, effect=True)(returning({"receipt": 17}))
    assert (await runner.run([charge], Num(), run_id="effect")).status is RunStatus.SUSPENDED
    (one,) = rejected_outputs(store, "effect")
    assert one.value == {"receipt": 17}


async def test_no_stores_nothing(tmp_path: Path) -> None:
    """keep_rejected="no" stores nothing, and a notebook shows nothing."""
    store = SQLiteStore(tmp_path / "one.db")
    result = await quick(store=store, keep_rejected="no").run([rate([BAD])], Num(), run_id="r")
    assert rejected_outputs(store, "r") == [None]
    assert "rejected output" not in result._repr_html_()
    with pytest.raises(ValueError, match="keep_rejected"):
        RunConfig(keep_rejected="yes")


def drop_name(state: dict[str, Any]) -> dict[str, Any]:
    state.pop("name", None)
    return state


async def test_what_redact_hides_is_not_stored(tmp_path: Path) -> None:
    """redact is applied to a copy before anything is stored; a hidden value is in no complaint or path."""
    seen: list[Any] = []

    class Strict(BaseModel):
        stars: int
        about: dict[str, int] = {}

    async def answer(state: Num) -> Any:
        failed = current_node_or_none().last_failure  # type: ignore[union-attr]
        seen.append(None if failed is None else failed.as_prompt())
        return {"name": "Ann Smith", "stars": "five", "about": {"Ann Smith": "x"}}

    store = SQLiteStore(tmp_path / "one.db")
    runner = quick(store=store, redact=drop_name, contract_retries={"rate": 1})
    await runner.run([node("rate", answer, Num, Strict)], Num(), run_id="r")
    one = rejected_outputs(store, "r")[0]
    assert "name" not in one.value
    assert "Ann Smith" not in str(one.complaints)
    assert one.complaints[1].path == ("about", "[redacted]")
    assert "Ann Smith" in seen[1], "the prompt is for the model that said it"
    assert b'"name"' not in one.encode()


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        ("I cannot rate this: it has no text", True),
        ('{"name": "Ann Smith", "stars": 3, "wh', False),
        ("```json\n{'name' : 'Ann Smith'}```", False),
        ("name=Ann Smith", False),
        ('{"stars": 3, "wh', True),
    ],
)
async def test_a_text_that_names_a_hidden_value_is_hidden(tmp_path: Path, text: str, is_shown: bool) -> None:
    """A text is stored if redact hides none of the fields that it names, also where the viewer redacts."""
    one = await stored(tmp_path, text, redact=drop_name)
    assert one.value == (text if is_shown else "[redacted]")
    await stored(tmp_path, text)
    (viewed,) = rejected_outputs(SQLiteStore(tmp_path / "1.db"), "r", drop_name)
    assert viewed.value == one.value
    assert is_shown or "Ann" not in str(viewed)


async def test_a_redact_that_raises_hides_the_output(tmp_path: Path) -> None:
    """Where redact raises, or returns no dict, a word replaces it; the attempt fails by its contract."""

    def broken(state: dict[str, Any]) -> Any:
        raise KeyError("name")

    one = await stored(tmp_path, {"stars": "secret words"}, redact=broken)
    assert one.value == {"redacted": "redact raised KeyError"}
    assert "secret words" not in str(one)


async def test_full_is_neither_redacted_nor_cut_at_64_kib(tmp_path: Path) -> None:
    """keep_rejected="full" leaves redact out, up to 1 MiB; secrets are masked all the same."""
    answer = {"name": "Ann", "text": "x" * 500_000, "key": "sesame-open"}
    one = await stored(tmp_path, answer, redact=drop_name, keep_rejected="full")
    assert one.value == {**answer, "key": "**********"}
    one = await stored(tmp_path, {"text": "x" * 5_000_000}, keep_rejected="full")
    assert one.is_cut
    assert 1_000_000 < len(one.encode()) <= 1024 * 1024


async def test_secrets_are_masked(tmp_path: Path) -> None:
    """What the schema declares as a secret is masked wherever it recurs; so are secrets of the context."""

    async def answer(state: Num) -> Any:
        return {
            "stars": "sesame-open",
            "key": "sesame-open",
            "sesame-open": ["a sesame-open b", 4711_0815, SecretStr("another one")],
            "more": "another one, and token-xyz",
        }

    runner = quick(store=SQLiteStore(tmp_path / "one.db"), context={"token": SecretStr("token-xyz")})
    await runner.run([node("rate", answer, Num, Rating)], Num(), run_id="r")
    (one,) = rejected_outputs(SQLiteStore(tmp_path / "one.db"), "r")
    assert one.value["key"] == "**********"
    for secret in ("sesame-open", "another one", "token-xyz"):
        assert secret not in str(one)
        assert secret.encode() not in (tmp_path / "one.db").read_bytes()
    one = await stored(tmp_path, 'key: "sesame-open')
    assert one.value == "**********"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class Endless(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return map(str, iter(int, 1))

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def items(self) -> Any:
        return ((str(n), self) for n in iter(int, 1))


class Meta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class Named(metaclass=Meta):
    pass


class Loop(Enum):
    ONE = "é" * 10


def deep(levels: int) -> Any:
    value: Any = "bottom"
    for _ in range(levels):
        value = [{"a": value}]
    return value


def cyclic() -> Any:
    value: dict[Any, Any] = {"stars": "x"}
    value["self"] = [value]
    return value


def invalid_model() -> Rating:
    values: dict[str, Any] = {"stars": Hostile(), "why": cyclic(), "key": "s"}
    return Rating.model_construct(**values)


HOSTILE: list[Any] = [
    lambda: Hostile(),
    lambda: {"stars": Hostile(), 1: 2, (1, Hostile()): Hostile(), Loop.ONE: Loop.ONE},
    lambda: {"stars": Named(), "of": Named},
    lambda: deep(20_000),
    lambda: cyclic(),
    lambda: {"stars": 10**5000, "nan": [float("nan"), float("inf")], "b": b"\xff\x00" * 100_000},
    lambda: {"stars": "\ud800\x00\u202e" * 50_000},
    lambda: {str(n): "é" * 30 for n in range(100_000)},
    lambda: ["x"] * 1_000_000,
    lambda: invalid_model(),
    lambda: {"stars": iter(int, 1), "object": object(), "f": len},
    lambda: {"stars": {frozenset([1]), Loop.ONE}},
    lambda: "\ud800" * 100_000,
]


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
@pytest.mark.parametrize("make", HOSTILE, ids=range(len(HOSTILE)))
async def test_an_output_of_any_kind_fails_as_its_contract_says(store: Any, make: Any) -> None:
    """Deep, cyclic, huge and hostile outputs only fail their contract; at most 64 KiB are stored."""
    result = await quick(store=store).run([rate([make()])], Num(), run_id="r")
    assert (result.status, result.failure.reason) == (RunStatus.FAILED, "contract")
    (one,) = rejected_outputs(store, "r")
    assert len(one.encode()) <= LIMIT
    assert "rejected output" in result._repr_html_()
    json.dumps(one.to_json(), allow_nan=False)


def test_a_large_output_says_that_it_was_cut(tmp_path: Path) -> None:
    """What is larger than 64 KiB is cut, and says so; what is not, does not."""
    long = asyncio.run(stored(tmp_path, {"stars": "y" * 100_000}))
    assert long.is_cut
    assert 60_000 < len(long.encode()) <= LIMIT
    assert long.value["stars"].endswith("y…")
    short = asyncio.run(stored(tmp_path, {"stars": "y" * 60_000}))
    assert (short.is_cut, short.value) == (False, {"stars": "y" * 60_000})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=40,
)


@given(value=PLAIN, limit=st.integers(40, 4000))
def test_a_copy_is_within_its_limit(value: Any, limit: int) -> None:
    """A bounded copy is JSON of at most so many bytes; an uncut one is the value as JSON."""
    copy = BoundedCopy(limit)
    data = RejectedOutput(copy.copy(value), copy.is_cut, ()).encode()
    around = len(RejectedOutput(None, True, ()).encode()) - len("null")
    assert len(data) <= limit + around
    again = read_rejected(data)
    assert again.value == copy_of_copy(again.value, limit)


def copy_of_copy(value: Any, limit: int) -> Any:
    copy = BoundedCopy(10 * limit)
    return copy.copy(value)


def test_an_endless_value_is_cut() -> None:
    """A copy reads no more of a value than it holds."""
    copy = BoundedCopy(1000)
    assert len(json.dumps(copy.copy(Endless()), separators=(",", ":"))) <= 1000
    assert copy.is_cut


def test_the_newest_outputs_are_kept_in_memory() -> None:
    """A run in memory has the newest 4 MiB of its rejected outputs, and the last one whatever its size."""
    outputs = RecentOutputs()
    data = RejectedOutput("x" * 1_000_000, False, ()).encode()
    for start in range(100):
        outputs.add(0, "", start * 1000 + 7, data)
    assert [outputs.find(0, "", n * 1000 + 7) is not None for n in (95, 96, 99)] == [False, True, True]
    assert outputs.find(0, "", 99_000) == read_rejected(data)
    assert outputs.find(0, "", 99_001) is outputs.find(0, "1", 99_000) is None
    outputs.add(0, "", 1, RejectedOutput("x" * 5_000_000, False, ()).encode())
    assert outputs.find(0, "", 1) is not None
    assert outputs.find(0, "", 99_007) is None


def test_other_data_is_no_rejected_output() -> None:
    """What cannot be read back is no rejected output, and raises nothing."""
    for data in (
        b"",
        b"{}",
        b"[]",
        b'{"value": 1}',
        b'{"value":1,"cut":0,"complaints":3,"more_complaints":0}',
        b"\xff",
    ):
        assert read_rejected(data) is None


async def test_results_and_traces_for_hooks_have_no_rejected_output(tmp_path: Path) -> None:
    """A rejected output is not in the result that hooks get, not in a pickled trace or its events."""
    seen: list[Any] = []

    async def on_run_end(run_id: str, result: Any) -> None:
        seen.append((result._repr_html_(), result.trace.to_json(), pickle.dumps(result.trace)))
        assert result.trace._rejected is None

    runner = quick(store=SQLiteStore(tmp_path / "one.db"), hooks=NodeHooks(on_run_end=on_run_end))
    result = await runner.run([rate([{"stars": "a-word-of-the-model"}])], Num(), run_id="r")
    for text in seen[0]:
        assert "a-word-of-the-model" not in str(text)
    assert all(event.output_state is None for event in result.trace.walk())
    assert "a-word-of-the-model" not in result.trace.to_json()
    assert b"a-word-of-the-model" not in pickle.dumps(result.trace)
    assert "a-word-of-the-model" in result._repr_html_()


async def test_the_exception_has_the_rejected_output() -> None:
    """`exc.raw` has a rejected output whatever `keep_rejected` says, for hooks through `redact`."""
    seen: list[Any] = []

    on_node_failure = noting(seen, lambda run_id, node_id, exc, failure_class: exc.raw)

    async def rate_again(state: Num) -> dict[str, Any]:
        here = current_node_or_none()
        if here is not None and here.last_failure is not None:
            seen.append(vars(here.last_failure.exception)["raw"])
        return {"stars": "five", "why": "x"}

    runner = quick(
        keep_rejected="no",
        redact=lambda state: {**state, "why": "hidden"} if "why" in state else state,
        contract_retries={"rate": 1},
        hooks=NodeHooks(on_node_failure=on_node_failure),
    )
    assert (await runner.run([node("rate", rate_again, Num, Rating)], Num())).status is RunStatus.FAILED
    as_it_was, hidden = {"stars": "five", "why": "x"}, {"stars": "five", "why": "hidden"}
    assert seen == [hidden, as_it_was, hidden]


async def test_a_notebook_shows_it_field_by_field() -> None:
    """The HTML of a result and a trace shows what came beside each complaint, also for old events."""
    result = await quick().run([rate([BAD])], Num())
    list(result.trace)
    for text in (result._repr_html_(), result.trace._repr_html_(), result.to_html()):
        assert "<td><code>stars</code></td><td>Input should be a valid integer" in text
        assert "<td><code>&quot;five&quot;</code></td>" in text
    hidden = result.to_html(redact=lambda state: dict.fromkeys(state, "hidden"))
    assert "five" not in hidden
    assert "<td><code>&quot;hidden&quot;</code></td>" in hidden


async def test_a_codec_seals_it(tmp_path: Path) -> None:
    """Under a codec a rejected output is sealed for its place; without it, the run can still be read."""
    path = tmp_path / "one.db"
    with SQLiteStore(path, codec=Rot()) as store:
        await quick(store=store).run([rate([{"stars": "a-word-of-the-model"}])], Num(), run_id="r")
        (one,) = rejected_outputs(store, "r")
        assert one.value == {"stars": "a-word-of-the-model"}
    assert b"a-word-of-the-model" not in path.read_bytes()
    with SQLiteStore(path) as plain:
        assert rejected_outputs(plain, "r") == [None]
    with SQLiteStore(tmp_path / "old.db") as store:
        await quick(store=store).run([rate([BAD])], Num(), run_id="r")
    with SQLiteStore(tmp_path / "old.db", codec=Rot()) as later:
        assert rejected_outputs(later, "r") == [None], "nobody without the key can forge one"
    with SQLiteStore(tmp_path / "old.db", codec=Rot(), plain_until_migrated=True) as later:
        assert rejected_outputs(later, "r")[0] is not None


def test_a_damaged_row_is_no_output(tmp_path: Path) -> None:
    """A rejected output that was changed in the store is not shown: its error stands in its place."""
    import sqlite3

    asyncio.run(stored(tmp_path, BAD))
    with sqlite3.connect(tmp_path / "0.db") as db:
        assert db.execute("UPDATE steps SET output = x'7b7d' WHERE position = -11").rowcount == 1
    (shown,) = rejected_outputs(SQLiteStore(tmp_path / "0.db"), "r")
    assert (shown.value.startswith("[the rejected"), "is damaged" in shown.value) == (True, True)


def test_what_the_users_classes_raise_is_no_failure_of_its_own() -> None:
    """Names and texts of a violation of the user's own making are taken as they are."""
    from stroma.contracts.contract import ContractViolation
    from stroma.engine.redaction import Redactor
    from stroma.trace.trace import ExecutionTrace

    violation = ContractViolation("n", "output", {}, ["odd", {"loc": ["a", 3], "msg": "m" * 10_000}] * 100)
    one = read_rejected(
        encode_rejected(Text(text="x"), violation, "redacted", Redactor(None, {}, ExecutionTrace()))
    )
    assert [(c.path, c.message[:3]) for c in one.complaints] == [((), "odd"), (("a", 3), "mmm")]
    assert one.more == 150


async def test_a_store_without_a_journal_keeps_no_rejected_output() -> None:
    """A store of the simple protocol has no place for a rejected output; the run fails as it would anyway."""
    broken = node("a", lambda state: {"n": "no"})
    result = await quick(store=SimpleStore(), keep_rejected="full").run([broken], Num())
    assert result.status is RunStatus.FAILED
