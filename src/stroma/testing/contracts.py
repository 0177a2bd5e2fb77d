"""assert_contract_holds: call a node with inputs generated from its input schema."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from stroma._utils.distributions import missing
from stroma.checkpoint import AsyncInMemoryStore
from stroma.contracts.contract import ContractViolation
from stroma.contracts.node import contract_of_node, find_node
from stroma.contracts.schema import schema_of
from stroma.engine.tasks import has_running_loop
from stroma.failures.classes import FailureClass
from stroma.failures.policy import FailurePolicy
from stroma.runner.runner import StromaRunner
from stroma.testing.clock import FakeClock
from stroma.trace.plain import jsonable
from stroma.trace.result import RunStatus

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def inputs_of(
    model: type[BaseModel], fields: Mapping[str, SearchStrategy[Any]] | None = None
) -> SearchStrategy[BaseModel]:
    """Return a hypothesis strategy for instances of a model, by the annotations of its fields.

    ``fields``: strategies for single fields. Raises ImportError without hypothesis, TypeError that names a
    field without a known strategy.
    """
    try:
        from stroma.testing._strategies import instances
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise missing("hypothesis", "assert_contract_holds", "testing") from error
    return instances(model, fields or {})


def assert_contract_holds(
    node: Any,
    examples: int = 100,
    *,
    fields: Mapping[str, SearchStrategy[Any]] | None = None,
    inputs: SearchStrategy[Any] | None = None,
    runner: StromaRunner[Any] | None = None,
    allow: tuple[type[BaseException], ...] = (),
    seed: int | None = None,
) -> None:
    """Call a node with inputs that its input schema accepts, and check each output against its output schema.

    Each example is a run of this one node, without retries and without waits. A node that calls a provider
    needs a recording or a fake of it. The examples are the same each time, unless a ``seed`` is passed.

    ``fields``: strategies of hypothesis for single fields of the input; ``inputs``: one for the whole input.
    ``runner``: source of contracts and context. ``allow``: exceptions that the node may raise.

    Raises AssertionError with the smallest input that breaks the contract, or that the node raises for, and
    if the node returned nothing for any input;
    ImportError without hypothesis; TypeError for a group, a node without a contract, or an input without a
    known strategy.
    """
    target = find_node(node)
    runner = runner or StromaRunner.quick()
    contract = contract_of_node(target, runner.registry)
    if contract is None:
        raise TypeError(f"{target.node_id!r} has no contract; pass a node with a contract")
    strategy = inputs if inputs is not None else inputs_of(contract.input_schema, fields)
    never = dict.fromkeys(FailureClass, FailurePolicy(max_retries=0, backoff_seconds=0.0))
    none: dict[str, Any] = {"node_policies": {}, "contract_retries": {}, "limits": {}, "node_limits": {}}
    twin = runner._twin([node], AsyncInMemoryStore(), policy_map=never, breaker=None, **none)
    numbers = itertools.count()
    has_returned = False

    def holds(loop: asyncio.Runner, state: Any) -> None:
        nonlocal has_returned
        example = state if isinstance(state, BaseModel) else contract.input_schema.model_validate(state)
        result = loop.run(twin.run([node], example, run_id=f"example-{next(numbers)}"))
        failure = result.failure
        has_returned = has_returned or result.status is RunStatus.COMPLETED
        if failure is not None and not isinstance(failure.exception, allow):
            raise AssertionError(
                _failure_message(target.node_id, example, failure.exception, failure.message)
            )

    from hypothesis.errors import Unsatisfiable

    try:
        _without_loop(lambda: _try_examples(strategy, holds, examples, seed))
    except Unsatisfiable as error:
        raise TypeError(
            f"cannot generate inputs that the contract of node {target.node_id!r} accepts; pass strategies "
            "with fields=, or for the whole input with inputs="
        ) from error
    if not has_returned:
        raise AssertionError(
            f"node {target.node_id!r} returned no output for any example, so that nothing was checked; pass "
            "inputs= that it can process"
        )


def _try_examples(
    strategy: SearchStrategy[Any], holds: Callable[[asyncio.Runner, Any], None], count: int, seed: int | None
) -> None:
    """Call ``holds`` with examples of the strategy, on an event loop whose clock does not wait."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    clock = contextlib.nullcontext() if FakeClock._active is not None else FakeClock()
    with clock, asyncio.Runner() as loop:

        def try_example(state: Any) -> None:
            holds(loop, state)

        wrapped = given(strategy)(try_example)
        if seed is not None:
            wrapped = seeded(seed)(wrapped)
        settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=seed is None,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.filter_too_much,
                HealthCheck.data_too_large,
                HealthCheck.large_base_example,
            ],
            phases=(Phase.explicit, Phase.generate, Phase.target, Phase.shrink),
        )(wrapped)()


def _failure_message(node_id: str, state: BaseModel, error: BaseException, message: str) -> str:
    input_json = json.dumps(jsonable(schema_of(type(state)).raw(state)), ensure_ascii=False)
    if isinstance(error, ContractViolation) and error.direction == "output":
        return f"node {node_id!r} breaks its output contract: {message}; its input was {input_json}"
    return (
        f"node {node_id!r} raises {type(error).__name__} for an input that its contract accepts: "
        f"{message}; its input was {input_json}"
    )


def _without_loop(work: Callable[[], None]) -> None:
    """Call a function here, or in another thread if an event loop is running."""
    if not has_running_loop():
        work()
        return
    with ThreadPoolExecutor(1, "stroma-contracts") as pool:
        pool.submit(contextvars.copy_context().run, work).result()
