"""Redaction of states in traces, hooks and results."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.kit import Num, noting, passing, quick, record_node_hooks, returning

from stroma import NodeHooks, RunStatus, StromaRunner, stroma_node


@pytest.mark.core
async def test_what_the_end_of_a_run_shows_is_redacted() -> None:
    """``redact`` runs before any hook sees a state: final, of the trace, of a violation."""
    seen: list[Any] = []

    class Secretive(BaseModel):
        name: str = "secret"

    class Strict(BaseModel):
        name: str

    nodes = [
        stroma_node("first", input=Secretive, output=Secretive)(returning({"name": "secret too"})),
        stroma_node("second", input=Secretive, output=Strict)(returning({"name": 5, "why": "secret again"})),
    ]
    hooks = NodeHooks(on_run_end=noting(seen, lambda run_id, result: result))
    runner = StromaRunner.quick(hooks=[hooks, hooks], redact=lambda state: dict.fromkeys(state, "***"))
    result = await runner.run(nodes, Secretive())
    assert len(seen) == 2
    for shown in seen:
        assert shown.final_state.name == "***"
        assert all("secret" not in str(event) for event in shown.trace.walk())
        assert "secret" not in str(shown.failure.exception.raw)
        assert "secret" not in str(shown.failure.exception.errors)
    assert result.final_state == Secretive(name="secret too")
    assert result.trace.events_for("first")[0].input_state == {"name": "secret"}
    assert "secret" in str(result.failure.exception.raw)


class Pair(RootModel[list[int]]):
    pass


def cancelling(state: dict[str, Any]) -> Any:
    raise asyncio.CancelledError


def raising(state: dict[str, Any]) -> Any:
    raise ValueError("cannot")


@pytest.mark.core
@pytest.mark.parametrize(
    "redact",
    [
        lambda state: {1: 2},
        lambda state: {"cls": 1, "self": 2, "_fields_set": 3},
        lambda state: {},
        lambda state: None,
        raising,
        cancelling,
    ],
    ids=["odd keys", "odd names", "nothing", "None", "raises", "cancels"],
)
@pytest.mark.parametrize("root", [False, True], ids=["model", "root model"])
async def test_whatever_redact_makes_every_hook_is_called(redact: Any, root: bool) -> None:
    """If redact raises or returns another class, each hook is still called."""
    seen: list[str] = []
    shown: list[Any] = []

    async def end(run_id: str, result: Any) -> None:
        seen.append("run end")
        shown.append(result.final_state)

    kind: type[BaseModel] = Pair if root else Num
    state = Pair([7]) if root else Num(n=7)
    hooks = record_node_hooks(seen, on_run_start=noting(seen, lambda *_: "run start"), on_run_end=end)
    nodes = [stroma_node("a", input=kind, output=kind)(passing())]
    result = await quick(hooks=hooks, redact=redact).run(nodes, state)
    assert (result.status, result.final_state, result.hook_errors) == (RunStatus.COMPLETED, state, [])
    assert seen == ["run start", "start", "success", "run end"]
    assert type(shown[0]) is kind
    assert "7" not in repr(shown[0])


@pytest.mark.parametrize(
    ("instance", "root"), [({"root": "***"}, "***"), ({"hidden": True}, {"hidden": True})]
)
async def test_redact_of_a_root_model(instance: dict[str, Any], root: Any) -> None:
    """on_run_end gets what redact made of a root model's state, under the key "root" or without it."""
    shown: list[Any] = []

    end = noting(shown, lambda run_id, result: result.final_state.root)
    runner = quick(hooks=NodeHooks(on_run_end=end), redact=lambda _: instance)
    await runner.run([stroma_node("a", input=Pair, output=Pair)(passing())], Pair([7]))
    assert shown == [root]
