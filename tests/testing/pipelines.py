"""Nodes for the tests of the test kit."""

from collections.abc import Callable
from typing import Any

from tests.kit import Num as Number

from stroma import FailurePolicy, StromaRunner, stroma_node


def make(
    node_id: str, func: Callable[..., Any], input_model: type = Number, output_model: type = Number
) -> Any:
    """A node of any function; the function itself stays unmarked."""

    async def step(state: Any) -> Any:
        return await func(state)

    return stroma_node(node_id, input=input_model, output=output_model)(step)


async def add_one(state: Number) -> dict[str, int]:
    return {"n": state.n + 1}


async def double(state: Number) -> dict[str, int]:
    return {"n": state.n * 2}


def counted(node_id: str, calls: list[str]) -> Any:
    """A node that adds one, and notes that it was called."""

    async def step(state: Number) -> dict[str, int]:
        calls.append(node_id)
        return {"n": state.n + 1}

    return make(node_id, step)


def patient(seconds: float = 60.0, retries: int = 2, **config: Any) -> StromaRunner:
    """A runner that waits between attempts, always for as long."""
    policy = FailurePolicy(
        max_retries=retries, backoff_seconds=seconds, max_backoff_seconds=1e9, jitter=False
    )
    return StromaRunner.quick(policy_map={"RECOVERABLE": policy, "AMBIGUOUS": policy}, **config)
