"""Large states in blobs: referred to by the trace and by a resume, not held in memory."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, Field, SecretStr
from tests.kit import Note as Inner
from tests.kit import computing, context_of, ended, start_python
from tests.shared_stores import SHARED, opened, place

from stroma import (
    AsyncInMemoryStore,
    CorruptCheckpoint,
    FailurePolicy,
    RunStatus,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
)
from stroma.contracts.copying import StoredSnapshot
from stroma.trace import TraceEvent

LARGE = 20_000  # bytes from which these stores use blobs
ONCE: Any = {"AMBIGUOUS": FailurePolicy(max_retries=1, backoff_seconds=0)}


class Flat(BaseModel):
    n: int = 0
    text: str = ""
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    price: Decimal = Decimal("1.10")


class Packed(BaseModel):
    n: int = 0
    lines: list[str] = []
    by_name: dict[str, float] = {"nan": float("inf")}


class Nested(BaseModel):
    n: int = 0
    inner: Inner = Inner()
    anything: Any = None


class Aliased(BaseModel):
    n: int = 0
    text: str = Field(default="", alias="Text")


class Secretive(BaseModel):
    n: int = 0
    text: str = ""
    key: SecretStr = SecretStr("hunter2")


class Loose(BaseModel):
    n: int = 0
    text: str = ""
    key: Any = SecretStr("hunter2")


def large(kind: type[BaseModel], n: int, size: int = 2 * LARGE) -> dict[str, Any]:
    text = f"{n}é\n" + "x" * size
    outputs: dict[type[BaseModel], dict[str, Any]] = {
        Flat: {"text": text, "at": datetime(2027, 1, 1 + n, tzinfo=UTC)},
        Packed: {"lines": [text, "b"]},
        Nested: {"inner": {"text": text}, "anything": (1, {"a": b"b"})},
        Aliased: {"Text": text},
        Secretive: {"text": text},
        Loose: {"text": text},
    }
    return {"n": n, **outputs[kind]}


class Xor:
    """A codec that gives other bytes each time."""

    def __init__(self) -> None:
        self.number = 0

    def encode(self, data: bytes) -> bytes:
        self.number = self.number % 250 + 1
        return bytes([self.number]) + bytes(byte ^ self.number for byte in data)

    def decode(self, data: bytes) -> bytes:
        return bytes(byte ^ data[0] for byte in data[1:])


def open_store(kind: str, where: str, blobs: pathlib.Path, codec: Any = None) -> Any:
    return opened(kind, where, blobs=blobs, blob_bytes=LARGE, codec=codec)


@pytest.fixture(params=[*SHARED, "a codec"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Any]:
    kind, codec = ("sqlite", Xor()) if request.param == "a codec" else (request.param, None)
    with place(kind) as where, open_store(kind, where, tmp_path / "blobs", codec) as instance:
        yield instance


def nodes_of(runner: StromaRunner, kind: type[BaseModel], fails: list[int]) -> list[Any]:
    make = runner.node("make", input=kind, output=kind)(computing(lambda state: large(kind, state.n + 1)))

    @runner.node("again", input=kind, output=kind)
    async def again(state: Any) -> Any:
        if fails:
            raise LookupError(fails.pop())
        return large(kind, state.n + 1)

    return [make, make, parallel(again, make), again]


def rows_of(result: Any) -> list[Any]:
    findings, stack = [], list(result.trace.rows)
    while stack:
        row = stack.pop(0)
        assert not isinstance(row, TraceEvent)
        findings.append(row)
        stack += row.children or ()
    return findings


@pytest.mark.parametrize("kind", [Flat, Packed, Nested, Aliased])
async def test_a_trace_of_references_is_the_trace(kind: type[BaseModel], store: Any) -> None:
    """States that stand in blobs read the same in the trace as those of a run that holds them."""
    results = []
    for of in (store, AsyncInMemoryStore()):
        runner = StromaRunner.quick(store=of, policy_map=ONCE)
        results.append(await runner.run(nodes_of(runner, kind, [1]), kind(), run_id="r"))
    mine, theirs = results
    assert mine.status is theirs.status is RunStatus.COMPLETED, mine.failure
    first, *others = rows_of(mine)
    assert first.node_id == "make"
    for row in others:  # Rows hold neither outputs nor inputs, of failed attempts and in groups either.
        held = [row.input] if row.output is None else [row.input, row.output]
        for snapshot in held:
            source = getattr(snapshot, "source", snapshot)
            assert isinstance(source, StoredSnapshot), (row.node_id, snapshot)
    assert mine.trace.diff(theirs.trace) == []
    for one, other in zip(mine.trace.walk(), theirs.trace.walk(), strict=True):
        assert (one.input_state, one.output_state) == (other.input_state, other.output_state)
    assert mine.final_state == theirs.final_state


async def test_a_secret_keeps_no_input_in_memory(tmp_path: pathlib.Path) -> None:
    """An input with a secret that a codec encrypts is read from its blob, as any other."""
    with open_store("sqlite", str(tmp_path / "runs.db"), tmp_path / "blobs", Xor()) as store:
        runner = StromaRunner.quick(store=store, policy_map=ONCE)
        result = await runner.run(nodes_of(runner, Loose, [1]), Loose(), run_id="r")
    inputs = [row.input for row in rows_of(result)][1:]
    assert all(isinstance(getattr(one, "source", one), StoredSnapshot) for one in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Flat, Packed, Nested, Secretive])
async def test_a_resume_reads_each_state_when_it_comes_to_it(
    kind: type[BaseModel], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume holds references, reads each blob once and continues with the last state, with codecs too."""
    reads: list[str] = []
    with open_store("sqlite", str(tmp_path / "runs.db"), tmp_path / "blobs", Xor()) as store:
        runner = StromaRunner.quick(store=store)
        fails = [1, 2]
        nodes = nodes_of(runner, kind, [])[:2] * 3 + nodes_of(runner, kind, fails)[3:]
        assert (await runner.run(nodes, kind(), run_id="r")).status is RunStatus.PARTIAL
        blobs = store._payloads.blobs
        get = blobs.get

        def counted(name: str) -> Any:
            reads.append(name)
            return get(name)

        monkeypatch.setattr(blobs, "get", counted)
        result = await runner.run(nodes, kind(), run_id="r", resume=True)
        assert result.status is RunStatus.RESUMED
        assert result.final_state == kind(**large(kind, 7))
        assert len(reads) == 6
        (event,) = result.trace
        assert event.input_state["n"] == 6


@pytest.mark.slow
async def test_maps_and_steps_refer_to_their_states_too(store: Any) -> None:
    """Items of maps and steps of plain code stand in blobs like nodes, and read the same."""
    runner = StromaRunner.quick(store=store)

    class Texts(BaseModel):
        items: list[Inner]

    big = runner.node("big", input=Inner, output=Flat)(computing(lambda state: {"text": state.text * 3}))
    value = Texts(items=[Inner(text=str(n) * LARGE) for n in range(3)])
    result = await runner.run([map_over("items", big, into="out")], value, run_id="r")
    assert all(isinstance(row.output, StoredSnapshot) for row in rows_of(result))
    (event,) = result.trace
    texts = [
        (child.output_state or {})["text"] for child in event.children
    ]  # In the order in which they ended.
    assert sorted(texts) == [item.text * 3 for item in value.items]
    ctx = context_of(runner)
    state: Any = Flat(text="0" * LARGE)

    async def add(state: Any) -> Any:
        return {**state.model_dump(), "n": state.n + 1}

    for _ in range(2):
        step = await execute_step("step", add, state, ctx)
        state = step.final_state
    assert [event.output_state["n"] for event in step.trace if event.output_state] == [1, 2]


@pytest.mark.slow
async def test_a_blob_that_is_gone_is_said_where_it_is_needed(tmp_path: pathlib.Path) -> None:
    """A missing blob makes one state of the trace unavailable and a resume from it a CorruptCheckpoint."""
    with open_store("sqlite", str(tmp_path / "runs.db"), tmp_path / "blobs") as store:
        runner = StromaRunner.quick(store=store)
        nodes = nodes_of(runner, Flat, [1, 2])
        nodes = [*nodes[:2], nodes[3]]
        result = await runner.run(nodes, Flat(), run_id="r")
        assert result.status is RunStatus.PARTIAL
        files = sorted((tmp_path / "blobs").glob("??/*"), key=lambda file: file.stat().st_mtime_ns)
        files[0].unlink()
        first, second, *_ = result.trace
        assert "which is not in" in first.output_state["unavailable"]
        assert "which is not in" in second.input_state["unavailable"]
        assert second.output_state["n"] == 2
        with pytest.raises(CorruptCheckpoint, match=r"the output of node 'make' at position 0.*resume_from="):
            await runner.run(nodes, Flat(), run_id="r", resume=True)


PROGRAM = """
import asyncio, sys
from pydantic import BaseModel
from stroma import SQLiteStore, StromaRunner

mode, path, count, shape = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

class Text(BaseModel):
    n: int = 0
    text: str = ""

class Lines(BaseModel):
    n: int = 0
    lines: list[str] = []

kind = Text if shape == "text" else Lines
runner = StromaRunner.quick(store=SQLiteStore(path + "/runs.db", blobs=path + "/blobs"))

@runner.node("make", input=kind, output=kind)
async def make(state):
    text = chr(97 + state.n % 26) * 1_000_000 + str(state.n)
    return {"n": state.n + 1, "text": text} if kind is Text else {"n": state.n + 1, "lines": [text]}

@runner.node("stop", input=kind, output=Text)
async def stop(state):
    if mode == "run":
        raise ValueError("no")
    return {"n": state.n}

nodes = [make] * count + [stop]
result = asyncio.run(runner.run(nodes, kind(), run_id="r", resume=mode == "resume"))
assert result.status == ("PARTIAL" if mode == "run" else "RESUMED"), result.failure
# Not ru_maxrss: after a fork that includes the memory of the process that started this one.
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("shape", ["text", "lines"])
@pytest.mark.parametrize(
    "count", [pytest.param(150, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.nightly)]
)
def test_payloads_of_a_megabyte_take_no_memory_each(count: int, shape: str, tmp_path: pathlib.Path) -> None:
    """A run of 1,000 payloads of 1 MB with ``blobs=`` stays under 200 MB, and so does its resume."""
    most = 200 if count == 1000 else 120
    for mode in ("run", "resume"):
        process = start_python(mode, tmp_path, count, shape, code=PROGRAM)
        assert int(ended(process, timeout=110)) < most, mode


@pytest.mark.parametrize("kind", SHARED)
async def test_a_very_large_state_is_a_warning(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first state of a store that is above the limit is named, with the way out; smaller ones are not."""
    for module in ("session", "run_store"):
        monkeypatch.setattr(f"stroma.checkpoint.durable.{module}.LARGE_BYTES", LARGE)
    with place(kind) as where:
        runner = StromaRunner.quick(store=opened(kind, where))

        @runner.node("grow", input=Flat, output=Flat)
        async def grow(state: Flat) -> Flat:
            return Flat(text=state.text + "x" * LARGE)

        await runner.run([grow, grow], Flat(), run_id="a")
        await runner.run([grow], Flat(text="x" * LARGE), run_id="b")
        await runner.aclose()
        other = StromaRunner.quick(store=opened(kind, where))
        await other.run([grow], Flat(text="x" * LARGE), run_id="c")
        await other.aclose()
    texts = [one.getMessage() for one in caplog.records if " MB" in one.getMessage()]
    subjects = [text.partition(" has ")[0] for text in texts]
    assert subjects == ["the output of node 'grow' in run 'a'", "the input of run 'c'"]
    assert texts[0].endswith(
        "store large data in a file or an object store, and pass its path on in the state"
    )
