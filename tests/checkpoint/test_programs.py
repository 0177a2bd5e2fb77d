"""Programs that fork, have several event loops, or do not close their store; over every durable store."""

import asyncio
import textwrap
from typing import Any

import pytest
from tests.kit import ended, start_python
from tests.shared_stores import opened
from tests.store_suite.journal import State, begin, commit, finish

PRELUDE = """
    import asyncio, gc, os, sys
    from tests.checkpoint.test_programs import write
    from tests.shared_stores import opened

    store, unused = opened(*sys.argv[1:]), opened(*sys.argv[1:])
"""


async def write(store: Any, run_id: str) -> None:
    session = await begin(store, run_id)
    for position in range(20):
        await commit(session, position, State(n=position))
    await finish(session)


def run(code: str, journal: tuple[str, str]) -> None:
    """Run a program that has two stores at one place to its end."""
    ended(start_python(*journal, code=textwrap.dedent(PRELUDE) + textwrap.dedent(code)))


def committed(journal: tuple[str, str]) -> dict[str, int]:
    """Return the number of committed nodes of each run."""
    with opened(*journal) as store:
        return {run.run_id: run.nodes for run in store.list_runs()}


@pytest.mark.slow
def test_a_forked_child_connects_anew(journal: tuple[str, str]) -> None:
    """After a fork both processes write, each on connections of its own, whose end is not the other's."""
    run(
        """
        asyncio.run(write(store, "before"))
        asyncio.run(write(unused, "unused"))
        pid = os.fork()
        if pid == 0:
            del unused
            gc.collect()
            asyncio.run(write(store, "child"))
            store.close()
            sys.exit(0)  # Not os._exit(): whatever ends is collected.
        asyncio.run(write(store, "parent"))
        assert os.waitpid(pid, 0)[1] == 0
        asyncio.run(write(store, "after"))
        asyncio.run(write(unused, "unused after"))
        store.close()
        """,
        journal,
    )
    run_ids = ("before", "unused", "child", "parent", "after", "unused after")
    assert committed(journal) == dict.fromkeys(run_ids, 20)


@pytest.mark.slow
def test_a_program_that_forgets_to_close(journal: tuple[str, str]) -> None:
    """It ends all the same, with everything stored, and from several event loops."""
    run("for run_id in 'ab': asyncio.run(write(store, run_id))", journal)
    assert committed(journal) == {"a": 20, "b": 20}


async def test_several_event_loops_use_one_store(journal: tuple[str, str]) -> None:
    """Event loops in several threads write through one store at once; each is woken in its own loop."""
    with opened(*journal) as store:
        threads = [asyncio.to_thread(asyncio.run, write(store, f"run{i}")) for i in range(6)]
        await asyncio.gather(*threads, write(store, "run6"))
    assert committed(journal) == {f"run{i}": 20 for i in range(7)}
