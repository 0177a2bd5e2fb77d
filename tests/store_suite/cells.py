"""Conformance tests for stores with cells."""

import asyncio
import threading
import time
from typing import Any

import pytest
from tests.store_suite.journal import HARD_IDS, State, begin, commit

from stroma.checkpoint.cells import Change


def put(data: bytes, results: Any = None) -> Change[Any]:
    """Return a change that replaces the data of a cell."""
    return lambda _data, _now: (data, results)


def count(data: bytes | None, _now: int) -> tuple[bytes, int]:
    """Increment the number in a cell and return it."""
    value = int(data or b"0") + 1
    return str(value).encode(), value


class CellStoreTests:
    """Conformance tests for cells. Inherit, and define a fixture ``store`` with an empty store.

    pytest-asyncio must be in auto mode, or your class be marked ``asyncio``.
    """

    @pytest.fixture
    def other(self, store: Any) -> Any:
        """Return another client of the same data; override it if processes can share the store."""
        return store

    async def test_two_clients_at_once(self, store: Any, other: Any) -> None:
        """Changes of one cell by two clients at the same moment build on each other: none is lost."""
        for _ in range(20):
            await asyncio.gather(store.change_cell("n", count), other.change_cell("n", count))
        assert store.read_cell("n")[0] == other.read_cell("n")[0] == b"40"

    async def test_a_cell_is_what_was_put_into_it(self, store: Any) -> None:
        """A change gets the bytes of the previous one, and its caller gets its result."""
        data = bytes(range(256)) * 400
        assert await store.change_cell("a", lambda old, now: (data, old)) is None
        assert await store.change_cell("a", lambda old, now: (b"{}", old)) == data
        assert store.read_cell("a")[0] == b"{}"

    async def test_a_change_that_changes_nothing(self, store: Any) -> None:
        """None leaves a cell as it is, one that is not there too."""
        assert await store.change_cell("a", lambda old, now: (None, (old, "read"))) == (None, "read")
        assert store.read_cell("a")[0] is None
        await store.change_cell("a", put(b"1"))
        assert await store.change_cell("a", lambda old, now: (None, old)) == b"1"
        assert store.read_cell("a")[0] == b"1"

    async def test_a_change_that_raises(self, store: Any) -> None:
        """An exception of a change leaves the cell and other changes alone, and reaches its caller."""

        def refuse(data: bytes | None, now: int) -> tuple[bytes | None, None]:
            raise ZeroDivisionError("no")

        await store.change_cell("a", put(b"1"))
        tasks = [store.change_cell("a", change) for change in (count, refuse, count)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert (results[0], results[2]) == (2, 3)
        assert isinstance(results[1], Exception)
        assert "no" in str(results[1])
        assert store.read_cell("a")[0] == b"3"

    async def test_cells_are_kept_apart(self, store: Any) -> None:
        """Any valid id names a separate cell; an invalid id is a ValueError."""
        for name in HARD_IDS:
            await store.change_cell(name, put(name.encode()))
        for name in HARD_IDS:
            assert store.read_cell(name)[0] == name.encode()
        for wrong in ("", "\0", "a\0", "\ud800", None, 1):
            with pytest.raises(ValueError):
                await store.change_cell(wrong, put(b"1"))
            with pytest.raises(ValueError):
                store.post_cell(wrong, put(b"1"))
            with pytest.raises(ValueError):
                store.read_cell(wrong)

    async def test_nothing_comes_between_reading_and_writing(self, store: Any) -> None:
        """Each of many changes at once, of tasks and threads, builds on the one before."""
        results: list[int] = []

        async def some() -> None:
            results.extend(await asyncio.gather(*(store.change_cell("n", count) for _ in range(15))))

        threads = [threading.Thread(target=lambda: asyncio.run(some())) for _ in range(3)]
        for thread in threads:
            thread.start()
        await some()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert sorted(results) == list(range(1, 61))
        assert store.read_cell("n")[0] == b"60"

    async def test_the_order_of_one_caller(self, store: Any) -> None:
        """Changes of one caller are applied in order, awaited or not."""
        first = store.change_cell("a", put(b"1"))
        first = asyncio.ensure_future(first)
        await asyncio.sleep(0)  # the change is requested now
        store.post_cell("a", lambda data, now: ((data or b"") + b"2", None))
        assert await store.change_cell("a", lambda data, now: ((data or b"") + b"3", data)) == b"12"
        await first
        assert store.read_cell("a")[0] == b"123"

    async def test_a_caller_that_goes_away(self, store: Any) -> None:
        """Cancelling the caller does not undo its change."""
        task = asyncio.ensure_future(store.change_cell("n", count))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.change_cell("n", count) == 2

    async def test_the_clock(self, store: Any) -> None:
        """Milliseconds since the epoch, by one clock for reading and changing, that does not go back."""
        before = await store.change_cell("a", lambda data, now: (b"1", now))
        read = store.read_cell("a")[1]
        after = await store.change_cell("a", lambda data, now: (None, now))
        assert all(isinstance(now, int) for now in (before, read, after))
        assert before <= read <= after
        assert abs(before - time.time() * 1000) < 600_000

    async def test_runs_and_cells_do_not_meet(self, store: Any) -> None:
        """A cell with the id of a run is independent of it, and stays when the run is deleted."""
        await store.change_cell("run", put(b"1"))
        assert store.list_runs() == []
        session = await begin(store)
        await commit(session, 0, State(n=1))
        deleted = store.delete("run")
        if deleted is not None:
            await deleted
        assert store.read_cell("run")[0] == b"1"
        assert store.list_runs() == []
