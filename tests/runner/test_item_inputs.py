"""What the attempts inside groups were given, in the trace, in stores and in what is exported of them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import Item as Count
from tests.kit import Text as Part
from tests.kit import computing, passing, returning
from tests.shared_stores import STORES, store_of

from stroma import JsonLines, RunStatus, StromaRunner, map_over, parallel
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.records import AttemptRecord
from stroma.trace.html import document


class Item(BaseModel):
    text: str
    parts: list[str] = ["p", "q"]


class Batch(BaseModel):
    items: list[Item]
    note: str = "for all"


store = store_fixture(*STORES)


def batch(count: int) -> Batch:
    return Batch(items=[Item(text=f"ticket {n}", parts=[f"p{n}", f"q{n}"]) for n in range(count)])


def nodes_of(runner: StromaRunner, fails: str = "") -> dict[str, Any]:
    @runner.node("count", input=Item, output=Count)
    async def count(item: Item) -> Any:
        if item.text == fails:
            raise LookupError("no")
        return {"n": len(item.text)}

    count_again = runner.node("again", input=Count, output=Count)(returning({"n": 1}))

    part = runner.node("part", input=Part, output=Part)(passing())
    whole = runner.node("whole", input=Batch, output=Count)(computing(lambda state: {"n": len(state.items)}))
    return {
        "map": map_over("items", count, into="out"),
        "map of groups": map_over("items", parallel(count), into="out"),
        "map of maps": map_over("items", map_over("parts", part, into="parted"), into="out"),
        "map of sequences": map_over("items", [count, parallel(count_again), count_again], into="out"),
        "map beside": parallel(whole, map_over("items", count, into="out")),
    }


def attempts_of(history: History) -> dict[str, AttemptRecord]:
    return {one.branch: one for one in history.attempts("r", 1000)[0]}


SHAPES: dict[str, dict[str, Any]] = {
    "map": {"0": "item 0", "2": "item 2"},
    "map of groups": {"1": "item 1", "1.0": "item 1"},
    "map of maps": {"1": "item 1", "1.0": "p1", "2.1": "q2"},
    "map of sequences": {"1": "item 1", "1.0": "item 1", "1.1": {"n": 8}, "1.1.0": {"n": 8}, "2.2": {"n": 1}},
    "map beside": {"0": "all", "1": "all", "1.2": "item 2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
async def test_an_item_has_its_own_input_in_every_store(shape: str, store: Any) -> None:
    """An item of a map has that item as input, nested nodes too; a child of ``parallel`` has its group's."""
    runner = StromaRunner.quick(store=store)
    if shape == "map of maps" and "Memory" in type(store).__name__:
        pytest.skip("a memory store does not read the state of a map of maps back")
    argument = batch(3)
    result = await runner.run([nodes_of(runner)[shape]], argument, run_id="r")
    assert result.status is RunStatus.COMPLETED
    events = {event.branch: event for event in result.trace.walk()}

    def look() -> None:
        history = History(store)
        match = attempts_of(history)
        whole = argument.model_dump()
        for branch, wanted in SHAPES[shape].items():
            value: Any = whole if wanted == "all" else wanted
            if isinstance(wanted, str) and wanted.startswith("item "):
                value = whole["items"][int(wanted[5:])]
            held = history.input_of("r", match[branch])
            assert (held.value, held.problem) == (value, None)
            record = history.store.get_run("r")
            assert record is not None
            at = f"0.{branch}"
            assert [bar.input_state for bar in history.story(record).bars if bar.at == at] == [value]
            in_trace = events[branch].input_state
            assert in_trace == ({"text": value} if isinstance(value, str) else value)

    await asyncio.to_thread(look)


@pytest.mark.slow
async def test_an_item_of_a_group_that_has_not_ended_has_its_own_input(store: Any) -> None:
    """The same while the map is under way, or its process died: the group itself is not recorded yet."""
    runner = StromaRunner.quick(store=store)
    value, seen = batch(3), asyncio.Event()

    @runner.node("slow", input=Item, output=Count)
    async def slow(item: Item) -> Any:
        if item.text == "ticket 2":
            seen.set()
            await asyncio.Event().wait()
        return {"n": 1}

    nodes = [map_over("items", slow, into="out", max_concurrency=1)]
    task = asyncio.ensure_future(runner.run(nodes, value, run_id="r"))
    await seen.wait()
    history = History(store)
    result = await asyncio.to_thread(attempts_of, history)
    held = await asyncio.to_thread(history.input_of, "r", result["1"])
    assert held.value == value.model_dump()["items"][1]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.slow
async def test_items_that_are_not_in_the_state_are_said_to_be_elsewhere(store: Any, tmp_path: Path) -> None:
    """Of items out of a file or a function the store has no input, and says so."""
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    runner = StromaRunner.quick(store=store)

    part = runner.node("part", input=Part, output=Part)(passing())

    sources: list[Any] = [JsonLines(str(path)), lambda state: [{"text": "a"}]]
    for number, source in enumerate(sources):
        run_id = f"r{number}"
        await runner.run([map_over(source, part, into="out")], batch(1), run_id=run_id)

        def look(run_id: str = run_id) -> Any:
            history = History(store)
            (item,) = [one for one in history.attempts(run_id, 10)[0] if one.branch]
            return history.input_of(run_id, item)

        held = await asyncio.to_thread(look)
        assert held.value is None
        assert "which is not in the state" in str(held.problem)


@pytest.mark.slow
async def test_exports_of_maps_grow_linearly(tmp_path: Path) -> None:
    """Ten times the items make an export, of a result and of a store, at most about ten times as large."""
    sizes: list[tuple[int, int]] = []
    with store_of("sqlite") as store:
        for count in (20, 200):
            runner = StromaRunner.quick(store=store)
            run_id = f"r{count}"
            result = await runner.run([nodes_of(runner)["map"]], batch(count), run_id=run_id)
            result.to_html(str(tmp_path / "run.html"))

            def export(run_id: str = run_id) -> str:
                history = History(store)
                record = history.store.get_run(run_id)
                assert record is not None
                return document(history.story(record))

            sizes.append(((tmp_path / "run.html").stat().st_size, len(await asyncio.to_thread(export))))
    (trace, stored), (ten_traces, ten_stored) = sizes
    assert ten_traces < 11 * trace
    assert ten_stored < 11 * stored
    assert stored < 2 * trace
