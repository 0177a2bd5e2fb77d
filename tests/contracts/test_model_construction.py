"""What is made in a shorter way is what the long way makes, and is shared with nobody."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import bare, computing

from stroma import StromaRunner, parallel
from stroma.contracts.copying import replicate
from stroma.contracts.schema import schema_of


class State(BaseModel):
    i: int = 0
    s: str = ""


@pytest.mark.core
@pytest.mark.parametrize("run_id", ["", "a\0b", "\ud800"])
async def test_an_illegal_run_id_is_refused_for_one_run(run_id: str) -> None:
    """run(run_id=) takes what every store can keep, and leaves the runner's config alone."""
    runner = StromaRunner.quick(tags=("kept",))
    with pytest.raises(ValueError, match="run id"):
        await runner.run([], State(), run_id=run_id)
    result = await runner.run([], State(), run_id="mine")
    assert result.run_id == "mine"
    assert "run_id" not in runner.config.model_fields_set


def test_a_stamped_copy_is_the_model_and_apart_from_it() -> None:
    """A copy is equal, of the same class, and what is set on one is not seen on the other."""
    model = State(i=3)
    twin = replicate(model)
    assert twin == model
    assert twin.model_fields_set == {"i"}
    twin.s = "changed"
    assert (model.s, model.model_fields_set) == ("", {"i"})


@pytest.mark.core
def test_a_state_that_was_not_validated_is_copied_deeply() -> None:
    """A list where the class declares text is no atom: a node without a contract gets one of its own."""
    held: Any = ["a"]
    model = State.model_construct(i=1, s=held)
    twin = schema_of(State).copy(model)
    twin.s.append("b")
    assert held == ["a"]


async def test_what_a_child_does_to_its_state_no_sibling_sees() -> None:
    """Children without contracts each have a copy of a flat state, and of what is nested in it."""
    seen: list[int] = []

    async def changes(state: Any) -> dict[str, Any]:
        state.i = 99
        return {"a": 1}

    async def looks(state: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        seen.append(state.i)
        return {"b": state.i}

    nodes = [parallel(bare("changes", changes), bare("looks", looks))]
    result = await StromaRunner.quick().run(nodes, State(i=1))
    assert seen == [1]
    assert result.trace.replay().__next__().input_state == {"i": 1, "s": ""}


@pytest.mark.core
@pytest.mark.parametrize("output", [{"a": 1}, {"a": {"deep": 1}}, {f"k{n}": n for n in range(100)}])
async def test_what_a_child_returned_is_kept_as_it_was(output: dict[str, Any]) -> None:
    """A dict that a child goes on changing changes neither the merged state nor the trace."""
    before = json.loads(json.dumps(output))

    async def changes(state: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if isinstance(output.get("a"), dict):
            output["a"]["deep"] = "changed"
        output["new"] = output["a" if "a" in output else "k1"] = "changed"
        return {}

    nodes = [parallel(bare("gives", computing(lambda _: output)), bare("changes", changes))]
    result = await StromaRunner.quick().run(nodes, State())
    assert result.final_state is not None, result.failure
    assert result.final_state.model_dump() == before
    value = next(event for event in result.trace.walk() if event.node_id == "gives")
    assert value.output_state == before
