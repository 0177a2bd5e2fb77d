"""LangGraph killed between its nodes: its own checkpointer and our journal, both in files."""

import operator
import pickle
import threading
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from tests.frameworks.kit import PAID, Ledger, answer, check_killed, die, guard_of, holds

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
    ledger = Ledger(place)

    def node(name: str) -> Any:
        def call(state: State) -> Any:
            if name == dies_before:
                die()
            ledger.pay(name)
            return {"words": [name]}

        return call

    builder = StateGraph(State)
    for name, before in zip(NODES, (START, *NODES), strict=False):
        builder.add_node(name, node(name))
        builder.add_edge(before, name)
    is_known = (place / "saved").exists()
    graph = attach(builder, guard).compile(checkpointer=FileSaver(place / "saved"))
    config: Any = {"configurable": {"thread_id": "1"}}
    answer(place, graph.invoke(None if is_known else {"words": []}, config, durability="sync")["words"])


@pytest.mark.nightly
@pytest.mark.timeout(300)
@holds("killed")
@pytest.mark.parametrize("dies_before", NODES)
def test_killed_between_nodes_it_goes_on_and_pays_for_nothing_twice(dies_before: str, tmp_path: Path) -> None:
    """After SIGKILL at a boundary, ``invoke(None)`` gives the right answer, in one run, paid once."""
    check_killed(live, tmp_path, dies_before, (list(NODES), NODES, 3 * PAID))
