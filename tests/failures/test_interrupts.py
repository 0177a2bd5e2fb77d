"""Exceptions that are no Exception: they end a run, and are no failures of its nodes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator
from tests.kit import Note, context_of, failing_with, noting, returning

from stroma import Flow, NodeHooks, RunStatus, SQLiteStore, StromaRunner, execute_step, map_over, parallel
from stroma.adapters import Guard


class Texts(BaseModel):
    items: list[Note] = [Note()]


class StopNow(BaseException):
    """A program's own way to stop, such as ``pytest.fail`` or a GreenletExit."""


RAISED: dict[str, Any] = {
    "own": lambda: StopNow("now"),
    "group": lambda: BaseExceptionGroup("several", [StopNow("now"), ValueError("x")]),
    "interrupt": lambda: KeyboardInterrupt("now"),
    "exit": lambda: SystemExit(3),
    "closed": lambda: GeneratorExit("now"),
}


def watch(seen: list[str]) -> NodeHooks:
    started = noting(seen, lambda *_: "start")
    failed = noting(seen, lambda *_: "failure")
    cancelled = noting(seen, lambda *_: "cancelled")
    ended = noting(seen, lambda run_id, result: f"end {result.status}")
    return NodeHooks(
        on_node_start=started, on_node_failure=failed, on_node_cancelled=cancelled, on_run_end=ended
    )


@pytest.mark.parametrize("sync", [False, True], ids=["async", "thread"])
@pytest.mark.parametrize("name", [*RAISED])
@pytest.mark.parametrize("place", ["node", "child", "item"])
def test_what_is_no_exception_ends_the_run(name: str, sync: bool, place: str, tmp_path: Path) -> None:
    """A BaseException that is no Exception comes out of ``run()``; the INTERRUPTED run can be resumed."""
    calls: list[str] = []
    seen: list[str] = []
    store = SQLiteStore(tmp_path / "runs.db")
    runner = StromaRunner.quick(store=store, hooks=watch(seen))

    @runner.node("first", input=Texts, output=Texts)
    async def first(state: Texts) -> Any:
        calls.append("first")
        return state

    def stop_once(state: Any) -> Any:
        calls.append("stops")
        if calls.count("stops") == 1:
            raise RAISED[name]()
        return {"text": "done"}

    async def stop_once_async(state: Any) -> Any:
        return stop_once(state)

    kind = Note if place == "item" else Texts
    stops = runner.node("stops", input=kind, output=Note)(stop_once if sync else stop_once_async)
    last = {"node": stops, "child": parallel(stops), "item": map_over("items", stops, into="out")}[place]
    with pytest.raises(BaseException) as raised:
        asyncio.run(runner.run([first, last], Texts(), run_id="r"))
    assert type(raised.value) is type(RAISED[name]())
    assert calls == ["first", "stops"]
    assert "failure" not in seen
    assert seen.count("start") == (2 if place == "node" else 3)
    assert seen[-1] == "end INTERRUPTED"
    assert seen.count("cancelled") == (1 if place == "node" else 2)
    result = asyncio.run(runner.run([first, last], Texts(), run_id="r", resume=True))
    assert (result.status, calls) == (RunStatus.RESUMED, ["first", "stops", "stops"])


@pytest.mark.parametrize("place", ["node", "step", "body"])
@pytest.mark.parametrize("name", [*RAISED])
def test_what_is_no_exception_is_recorded_as_an_interruption(name: str, place: str, tmp_path: Path) -> None:
    """The store says INTERRUPTED of a run that a BaseException ended, so that ``recover()`` finds it."""
    store = SQLiteStore(tmp_path / "runs.db")
    runner = StromaRunner.quick(store=store)

    @runner.node("stops", input=Note, output=Note)
    async def stops(state: Note) -> Any:
        raise RAISED[name]()

    @runner.flow("calls", input=Note, output=Note)
    async def calls(flow: Flow, state: Note) -> Note:
        if place == "body":
            raise RAISED[name]()
        return await flow.step(stops, state)

    with pytest.raises(BaseException, match=r"now|several|3"):
        asyncio.run(runner.run([stops] if place == "node" else calls, Note(), run_id="r"))
    run = store.get_run("r")
    assert run.status == "INTERRUPTED"


async def test_what_is_no_exception_passes_through_steps() -> None:
    """A BaseException of a step's function comes out of ``execute_step``; its run is INTERRUPTED."""
    seen: list[str] = []
    runner = StromaRunner.quick(hooks=watch(seen))

    ctx = context_of(runner)
    with pytest.raises(StopNow):
        async with ctx:
            await execute_step("stops", failing_with(StopNow, "now"), Note(), ctx)
    assert seen == ["start", "cancelled", "end INTERRUPTED"]


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
def test_what_is_no_exception_passes_through_guarded_functions(sync: bool) -> None:
    """A BaseException of a guarded function comes out of its call at once, and is not tried again."""
    calls: list[int] = []
    guard = Guard()

    def stops() -> None:
        calls.append(1)
        raise StopNow("now")

    async def stops_async() -> None:
        stops()

    with pytest.raises(StopNow):
        if sync:
            guard.wrap("stops", stops)()
        else:
            asyncio.run(guard.wrap("stops", stops_async)())
    assert calls == [1]


@pytest.mark.parametrize("side", ["input", "output", "classifier"])
async def test_what_is_no_exception_passes_through_validators_and_classifiers(side: str) -> None:
    """A BaseException in a user's validator or classifier comes out of ``run()``, not as a violation."""

    class Strict(BaseModel):
        text: str = ""

        @field_validator("text")
        @classmethod
        def _stops(cls, value: str) -> str:
            raise StopNow("now")

    def classifier(error: Exception, where: Any) -> None:
        raise StopNow("now")

    seen: list[str] = []
    runner = StromaRunner.quick(hooks=watch(seen), classifiers=[classifier])
    argument, instance = (Strict, Note) if side == "input" else (Note, Strict)

    @runner.node("stops", input=argument, output=instance)
    async def stops(state: Any) -> Any:
        if side == "classifier":
            raise ValueError("x")
        return {"text": "x"}

    with pytest.raises(StopNow):
        await runner.run([stops], Note(text="x"))
    assert seen == ["start"] * (side != "input") + ["cancelled"] * (side != "input") + ["end INTERRUPTED"]


async def test_a_panic_of_native_code_in_a_validator_is_a_violation() -> None:
    """What pydantic itself panics over breaks the contract: an answer of a model may have caused it."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    class Strict(BaseModel):
        text: str = ""

        @field_validator("text")
        @classmethod
        def _panics(cls, value: str) -> str:
            raise panic("index out of bounds")

    runner = StromaRunner.quick()
    ask = runner.node("ask", input=Note, output=Strict)(returning({"text": "x"}))
    result = await runner.run([ask], Note())
    assert (result.status, result.failure.reason) == (RunStatus.FAILED, "contract")
