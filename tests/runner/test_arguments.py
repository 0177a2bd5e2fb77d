"""What may be given to a runner, and that anything else is told before a node is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    InMemoryStore,
    SQLiteStore,
    StromaRunner,
    open_store,
)


class State(BaseModel):
    n: int = 0


@pytest.mark.parametrize("form", [str, Path, "sqlite:///{}".format])
def test_a_runner_takes_the_url_or_path_of_a_store(tmp_path: Path, form: Any) -> None:
    file = tmp_path / "runs.db"
    runner = StromaRunner.quick(store=form(str(file)), run_id="r")

    @runner.node("add", input=State, output=State)
    async def add(state: State) -> State:
        return State(n=state.n + 1)

    assert runner.run_sync([add], State()).final_state == State(n=1)
    record = SQLiteStore(file).get_run("r")
    assert record is not None
    assert record.status == "COMPLETED"


def test_a_url_that_names_no_store_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="mysql:// stores are not available"):
        StromaRunner.quick(store="mysql://host/db")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("redis://:secret@host/0", "store must be a store, got str; pass open_store(url)"),
        (Path("runs.db"), f"store must be a store, got {type(Path()).__name__}; pass open_store(url)"),
        (
            AsyncInMemoryStore,
            "store must be an instance, got the class AsyncInMemoryStore; pass AsyncInMemoryStore(...)",
        ),
        ({}, "store must have save, load and delete, got dict"),
        (None, "store must have save, load and delete, got NoneType"),
    ],
)
def test_what_is_no_store_is_told_when_it_is_given(value: Any, text: str) -> None:
    """Not when the first output is to be kept, which is paid for by then; and no password is told with it."""
    with pytest.raises(TypeError) as caught:
        CheckpointManager(value)
    assert str(caught.value) == text


def test_every_store_is_one() -> None:
    class Simple:
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
        def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
        def delete(self, run_id: str) -> None: ...

    for store in (InMemoryStore(), AsyncInMemoryStore(), open_store("memory://"), Simple()):
        assert CheckpointManager(store).store is store


@pytest.mark.parametrize(
    "value",
    [print, [print], {"on_node_start": print}, "hooks", 5],
    ids=["function", "list", "dict", "text", "number"],
)
def test_what_is_no_set_of_hooks_is_told_when_it_is_given(value: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a set of hooks; make one with NodeHooks\(\.\.\.\)$"):
        StromaRunner.quick(hooks=value)
