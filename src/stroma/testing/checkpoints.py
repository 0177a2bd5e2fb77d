"""Conformance tests for stores of the simple protocol (save, load, delete)."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from pydantic import BaseModel

from stroma.checkpoint import CheckpointManager, CheckpointNotFound
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import stroma_node
from stroma.runner.runner import StromaRunner
from stroma.trace.result import RunStatus

#: Ids that are hard to distinguish, to quote or to order.
HARD_IDS = (
    "a",
    "a:b",
    "a:",
    ":b",
    "*",
    "?",
    "[a]",
    "/",
    "..",
    "a/b",
    "a\nb",
    " ",
    "a ",
    "'",
    '"',
    "%",
    "_",
    "\\",
    "{a}",
    "}{",
    "é",
    "e\u0301",
    "🦜",
    "\u00a0",
    "A",
    "last",
    "\x7f",
    "\ufffe",
    "\U0010ffff",
    "x" * 3000,
    "x" * 2999 + "y",
)


class State(BaseModel):
    """A state of the tests."""

    text: str = ""
    n: int = 0
    value: float = 0.0
    data: bytes = b""


async def settled(value: Any) -> Any:
    """Await what can be awaited."""
    return await value if inspect.isawaitable(value) else value


class Document(BaseModel):
    """A model other than State."""

    title: str
    parts: list[State] = []
    sizes: dict[str, int] = {}


class CheckpointStoreTests:
    """Conformance tests of the simple protocol, sync or async: inherit, and define a fixture ``store``.

    Override :meth:`reopened` if the data outlives the object. pytest-asyncio must be in auto mode, or your
    class be marked ``asyncio``.
    """

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError("define a fixture `store` that returns an empty store")

    async def reopened(self, store: Any) -> Any:
        """Return another store object on the same data, as in another process; None if impossible."""
        return None

    async def test_what_was_saved_is_loaded(self, store: Any) -> None:
        """A state comes back equal to what was saved, as an instance of its class."""
        state = State(text="é\n\0🦜", n=-(2**60), value=0.1, data=b"\x00\xff")
        await settled(store.save("run", "node", state))
        loaded = await settled(store.load("run", "node"))
        assert type(loaded) is State
        assert loaded == state

    async def test_a_state_of_any_class(self, store: Any) -> None:
        """Lists, dicts and models inside of a model come back as such."""
        state = Document(title="t", parts=[State(n=1), State(n=2)], sizes={"a:b": 1, "": 2})
        await settled(store.save("run", "node", state))
        assert await settled(store.load("run", "node")) == state

    async def test_what_was_never_saved(self, store: Any) -> None:
        """load() of an unknown run or node returns None."""
        assert await settled(store.load("run", "node")) is None
        await settled(store.save("run", "node", State(n=1)))
        assert await settled(store.load("run", "other")) is None
        assert await settled(store.load("other", "node")) is None

    async def test_the_last_state_counts(self, store: Any) -> None:
        """Saving again replaces the state, even by one of another class."""
        for n in range(3):
            await settled(store.save("run", "node", State(n=n)))
        assert await settled(store.load("run", "node")) == State(n=2)
        await settled(store.save("run", "node", Document(title="t")))
        assert await settled(store.load("run", "node")) == Document(title="t")

    async def test_nodes_and_runs_are_apart(self, store: Any) -> None:
        """Each node of each run has its own state."""
        for number, place in enumerate([("r1", "a"), ("r1", "b"), ("r2", "a")]):
            await settled(store.save(*place, State(n=number)))
        states = [await settled(store.load(*place)) for place in [("r1", "a"), ("r1", "b"), ("r2", "a")]]
        assert [state.n for state in states] == [0, 1, 2]

    async def test_ids_are_any_text(self, store: Any) -> None:
        """Ids with separators, wildcards, quotes, newlines, emoji and 3,000 characters are distinct."""
        places = [(run, "node") for run in HARD_IDS] + [("run", node) for node in HARD_IDS]
        places += [("a:b", "c"), ("a", "b:c"), ("a/b", "c"), ("a", "b/c")]
        for number, place in enumerate(places):
            await settled(store.save(*place, State(n=number)))
        for number, place in enumerate(places):
            assert (await settled(store.load(*place))).n == number, place

    async def test_delete_forgets_one_run(self, store: Any) -> None:
        """delete() removes all nodes of the run and none of another; deleting an unknown run is no error."""
        for run, node in [("a", "x"), ("a", "y"), ("a:b", "x"), ("ab", "x"), ("*", "x")]:
            await settled(store.save(run, node, State(text=run)))
        await settled(store.delete("*"))
        await settled(store.delete("a"))
        await settled(store.delete("a"))
        await settled(store.delete("never"))
        assert await settled(store.load("a", "x")) is None
        assert await settled(store.load("a", "y")) is None
        assert await settled(store.load("*", "x")) is None
        for run in ("a:b", "ab"):
            assert await settled(store.load(run, "x")) == State(text=run)

    async def test_a_deleted_run_begins_anew(self, store: Any) -> None:
        """After a delete the same ids can be saved again."""
        await settled(store.save("run", "node", State(n=1)))
        await settled(store.delete("run"))
        await settled(store.save("run", "node", State(n=2)))
        assert await settled(store.load("run", "node")) == State(n=2)

    async def test_later_changes_of_an_object_are_not_in_the_store(self, store: Any) -> None:
        """Changes to an object after it was saved, or to a loaded one, do not change the stored state."""
        state = Document(title="t", sizes={"a": 1})
        await settled(store.save("run", "node", state))
        state.sizes["a"] = 2
        loaded = await settled(store.load("run", "node"))
        assert loaded.sizes == {"a": 1}
        loaded.sizes["a"] = 3
        assert (await settled(store.load("run", "node"))).sizes == {"a": 1}

    async def test_many_at_once(self, store: Any) -> None:
        """States that are saved concurrently are all stored."""

        async def save(number: int) -> None:
            await settled(store.save(f"run {number % 3}", f"node {number}", State(n=number)))

        await asyncio.gather(*(save(number) for number in range(60)))
        for number in range(60):
            assert (await settled(store.load(f"run {number % 3}", f"node {number}"))).n == number

    async def test_another_object_finds_what_was_saved(self, store: Any) -> None:
        """Another object on the same data finds the saved states."""
        await settled(store.save("run", "node", State(n=7)))
        other = await self.reopened(store)
        if other is None:
            pytest.skip("the data of this store does not outlive it")
        assert await settled(other.load("run", "node")) == State(n=7)
        await settled(other.delete("run"))
        assert await settled(other.load("run", "node")) is None

    async def test_a_run_goes_on_from_a_checkpoint(self, store: Any) -> None:
        """A run saves the output of each node, and ``resume_from`` continues with the one before."""
        contract: NodeContract[State, State] = NodeContract(
            node_id="n", input_schema=State, output_schema=State
        )
        calls: list[str] = []

        def make(node_id: str) -> Any:
            async def step(state: State) -> State:
                calls.append(node_id)
                return State(n=state.n + 1)

            return stroma_node(node_id, contract)(step)

        runner = StromaRunner(ContractRegistry(), CheckpointManager(store))
        nodes = [make("a"), make("b"), make("c")]
        result = await runner.run(nodes, State(), run_id="run")
        assert result.status is RunStatus.COMPLETED
        assert await settled(store.load("run", "b")) == State(n=2)
        calls.clear()
        again = await runner.run(nodes, State(), run_id="run", resume_from="c")
        assert (again.status, again.final_state, calls) == (RunStatus.RESUMED, State(n=3), ["c"])
        await settled(store.delete("run"))
        with pytest.raises(CheckpointNotFound):
            await runner.run(nodes, State(), run_id="run", resume_from="c")
