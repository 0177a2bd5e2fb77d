"""LangGraph killed between its nodes: its own checkpointer and our journal, both in files."""

from __future__ import annotations

import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from tests.frameworks.kit import PAID, guard_of, holds, pay

from stroma import SQLiteStore
from stroma.adapters.langgraph import attach


class State(TypedDict):
    words: Annotated[list[str], operator.add]


NODES = ("first", "second", "third")


class FileSaver(InMemorySaver):
    """LangGraph's saver in memory, written to a file before each call of it returns."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.lock = threading.Lock()  # LangGraph writes in threads.
        if path.exists():
            for name, value in pickle.loads(path.read_bytes()).items():
                getattr(self, name).update(value)

    def _write(self) -> None:
        kept = {
            "storage": {k: {n: dict(c) for n, c in v.items()} for k, v in self.storage.items()},
            "writes": {k: dict(v) for k, v in self.writes.items()},
            "blobs": dict(self.blobs),
        }
        new = self.path.with_suffix(".new")
        new.write_bytes(pickle.dumps(kept))
        new.replace(self.path)

    def put(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            config = super().put(*args, **kwargs)
            self._write()
        return config

    def put_writes(self, *args: Any, **kwargs: Any) -> None:
        with self.lock:
            super().put_writes(*args, **kwargs)
            self._write()


def live(folder: str, dies_before: str) -> None:
    """One process: call the graph, or go on where another one was killed, with LangGraph's own way to."""
    place = Path(folder)
    guard = guard_of(store=str(place / "r.db"), run_id="r", resume=True, lease_seconds=0.2)
    side = os.open(place / "paid", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def node(name: str) -> Any:
        def call(state: State) -> Any:
            if name == dies_before:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(side, f"{name}\n".encode())
            pay()
            return {"words": [name]}

        return call

    builder = StateGraph(State)
    for name, before in zip(NODES, (START, *NODES), strict=False):
        builder.add_node(name, node(name))
        builder.add_edge(before, name)
    is_known = (place / "saved").exists()
    graph = attach(builder, guard).compile(checkpointer=FileSaver(place / "saved"))
    config: Any = {"configurable": {"thread_id": "1"}}
    print(graph.invoke(None if is_known else {"words": []}, config, durability="sync")["words"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@holds("killed")
@pytest.mark.parametrize("dies_before", NODES)
def test_killed_between_nodes_it_goes_on_and_pays_for_nothing_twice(dies_before: str, tmp_path: Path) -> None:
    """After SIGKILL at a boundary, ``invoke(None)`` gives the right answer, in one run, and no node is paid for twice."""
    program = "import sys; from tests.frameworks.langgraph.test_killed_between_nodes import live; live(*sys.argv[1:])"
    for life in (dies_before, ""):
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), life]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=root)
        assert done.returncode == (-signal.SIGKILL if life else 0), done.stderr
    assert done.stdout.splitlines()[-1] == str(list(NODES))
    assert (tmp_path / "paid").read_text().split() == list(NODES)
    with SQLiteStore(tmp_path / "r.db") as store:
        (run,) = store.list_runs()
        assert (run.status, run.tokens) == ("RESUMED", 3 * PAID)
