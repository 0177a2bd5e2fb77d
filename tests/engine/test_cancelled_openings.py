"""A run cancelled while being opened is left to the next process, at each await, of each store."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.engine.awaits import Awaits
from tests.fixtures import store_fixture
from tests.kit import Num, context_of, failing_with, node, quick
from tests.shared_stores import FAMILIES, opened

from stroma import NodeContract, SQLiteStore, execute_step
from stroma.checkpoint import RunRequest
from stroma.contracts.schema import schema_of

store = store_fixture(*FAMILIES)
#: More awaits than any of the runs here makes.
MANY = 200


async def add(state: Num) -> Any:
    await asyncio.sleep(0)
    return {"n": state.n + 1}


def a_list(store: Any, run_id: str, **more: Any) -> Coroutine[Any, Any, Any]:
    return quick(store=store).run([node("a", add)], Num(), run_id=run_id, **more)


async def plain_code(store: Any, run_id: str, **more: Any) -> Any:
    runner = quick(store=store, run_id=run_id, **more)
    contract = NodeContract(node_id="a", input_schema=Num, output_schema=Num)
    async with context_of(runner) as ctx:
        return await execute_step("a", add, Num(), ctx, contract=contract)


def cancel_all(awaits: Awaits, work: Coroutine[Any, Any, Any]) -> None:
    """Cancel all tasks of a loop that goes on."""

    async def main() -> None:
        own = asyncio.current_task()
        awaits.act = lambda: [task.cancel() for task in asyncio.all_tasks() if task is not own]
        awaits.of_new_tasks()
        await asyncio.wait([asyncio.ensure_future(work)])

    asyncio.run(main())


def end_the_loop(awaits: Awaits, work: Coroutine[Any, Any, Any]) -> None:
    """Return from the main task of asyncio.run(), which cancels all other tasks."""

    async def main() -> None:
        has_acted = asyncio.Event()
        awaits.act = has_acted.set
        awaits.of_new_tasks()
        running = asyncio.ensure_future(work)
        running.add_done_callback(lambda _: has_acted.set())
        await has_acted.wait()

    asyncio.run(main())


def interrupt(awaits: Awaits, work: Coroutine[Any, Any, Any]) -> None:
    """Raise KeyboardInterrupt out of asyncio.run()."""

    async def main() -> None:
        awaits.act = stop
        awaits.of_new_tasks()
        await asyncio.wait([asyncio.ensure_future(work)])

    def stop() -> None:
        raise KeyboardInterrupt

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        assert awaits.has_acted


@pytest.mark.core
@pytest.mark.parametrize("way", [cancel_all, end_the_loop, interrupt])
@pytest.mark.parametrize("work", [a_list, plain_code])
def test_a_run_is_left_to_others(store: Any, way: Callable[..., None], work: Callable[..., Any]) -> None:
    """A run whose tasks are all cancelled has no owner afterwards, at any await, and resumes at once."""
    check_all(store, way, work)


@pytest.mark.parametrize("more", [{"if_running": "attach"}, {"resume": True}])
def test_one_that_is_resumed_or_attached_to_is_left_too(store: Any, more: dict[str, Any]) -> None:
    """The same holds for a run that waits for another owner, or is resumed."""
    check_all(store, cancel_all, a_list, **more)


class Mirrored:
    """A codec."""

    def encode(self, data: bytes) -> bytes:
        return data[::-1]

    def decode(self, data: bytes) -> bytes:
        return data[::-1]


def test_one_with_a_codec_is_left_too(tmp_path: Any) -> None:
    """The same holds for a store that encrypts, which awaits more before the claim."""
    with SQLiteStore(tmp_path / "runs.db", codec=Mirrored()) as store:
        check_all(store, end_the_loop, a_list)


def check_all(store: Any, way: Callable[..., None], work: Callable[..., Any], **more: Any) -> None:
    """Have ``way`` happen at each await of a run in turn."""
    asyncio.run(a_list(store, "first"))  # A store without a run may not exist.
    for number in range(1, MANY):
        awaits, run_id = Awaits(number, lambda: None), f"r{number}"
        way(awaits, work(store, run_id, **more))
        record = store.get_run(run_id)
        if record is not None:  # Not in view of its process alone: another one goes by the lease.
            assert record.status != "RUNNING", (number, record.status)
            asyncio.run(work(store, run_id, if_exists="resume"))
            assert store.get_run(run_id).status in ("COMPLETED", "RESUMED"), number
        if not awaits.has_acted:
            break
    assert 1 < number < MANY - 1


async def test_a_run_that_is_opened_for_no_one_stands_as_before(journal: tuple[str, str]) -> None:
    """A resume that is cancelled while opened leaves status, error and pause of the run as they were."""
    with opened(*journal) as store:
        fail = failing_with(PermissionError, "no")
        await quick(store=store).run([node("a", fail)], Num(), run_id="failed")
        await quick(store=store).run([node("a", add)], Num(), run_id="complete")
        await store.fork("complete", "paused", 0)
        assert await store.pause("paused") is True
        for run_id in ("failed", "complete", "paused"):
            before = store.get_run(run_id)
            request = RunRequest(run_id, "pipeline", Num(), schema_of(Num), "resume")
            opening = asyncio.ensure_future(store.open_run(request))
            await asyncio.sleep(0)
            opening.cancel("that one")
            with pytest.raises(asyncio.CancelledError, match="that one"):
                await opening
            after = store.get_run(run_id)
            assert dataclasses.replace(after, epoch=0, updated_ms=0) == dataclasses.replace(
                before, epoch=0, updated_ms=0
            )
            assert after.epoch == before.epoch + 1
        assert await store.unpause("paused") is True


async def test_a_run_that_is_closed_while_it_is_opened_is_resumed_at_once(store: Any) -> None:
    """Closing the coroutine of a run while the store opens it leaves it to the same process."""
    running = a_list(store, "r")
    with contextlib.suppress(StopIteration):
        running.send(None)
    running.close()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)
    result = await a_list(store, "r", if_exists="resume")
    assert result.status in ("COMPLETED", "RESUMED")
