"""Defaults of a config, names of pipelines, run ids and idempotency keys."""

import asyncio
import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import TWICE, Num, One, context_on, node, passing, quick_without_retries
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    FailureClass,
    FallbackPolicy,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    StromaRunner,
    current_node,
    default_policy_map,
    parallel,
)

FIELDS = ("budget", "policy_map", "hooks", "classifiers", "model_fallbacks")
EXPECTED: dict[str, Any] = {
    "budget": ExecutionBudget.unlimited(),
    "policy_map": default_policy_map(),
    "hooks": NodeHooks(),
    "classifiers": [],
    "model_fallbacks": [],
}
EACH = pytest.mark.parametrize("field", FIELDS)
HOW = pytest.mark.parametrize(
    "make",
    [
        RunConfig,
        lambda: RunConfig(pipeline="p"),
        RunConfig.model_construct,
        lambda: RunConfig().with_run_id("r"),
    ],
    ids=["empty", "given", "constructed", "renamed"],
)


def change(field: str, value: Any) -> None:
    """Do to a default what its owner may do."""
    if field == "budget":
        value.max_tokens_total = 5
    elif field == "policy_map":
        value[FailureClass.AMBIGUOUS].max_retries = 9
        value.pop(FailureClass.TERMINAL)
    elif field == "hooks":
        value.on_run_start = print
    else:
        value.append(FallbackPolicy("dear", "cheap") if field == "model_fallbacks" else lambda *_: None)


@pytest.mark.core
@EACH
@HOW
def test_a_default_is_its_configs_own(field: str, make: Any) -> None:
    """Whoever changes it changes no other config, made before or after; read again, it is the same object."""
    mine, other = make(), make()
    assert getattr(mine, field) == EXPECTED[field]
    change(field, getattr(mine, field))
    assert getattr(mine, field) is getattr(mine, field)
    assert getattr(mine, field) != EXPECTED[field]
    for config in (other, make(), RunConfig(), RunConfig(tags=("a",))):
        assert getattr(config, field) == EXPECTED[field]
    assert RunConfig.model_fields[field].get_default(call_default_factory=True) == EXPECTED[field]


@EACH
def test_a_field_that_is_set_is_what_was_set(field: str) -> None:
    """Given or assigned, the very object; and it counts as given."""
    value = copy.deepcopy(EXPECTED[field])
    argument, assigned = RunConfig(**{field: value}), RunConfig()
    assert argument.model_fields_set == {field}
    setattr(assigned, field, value)
    assert getattr(assigned, field) is value
    assert assigned.model_fields_set == {field}
    if field not in ("policy_map", "model_fallbacks"):  # Validation copies dicts and lists.
        assert getattr(argument, field) is value


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize(
    "twin",
    [
        copy.copy,
        copy.deepcopy,
        lambda c: c.model_copy(),
        lambda c: c.model_copy(deep=True),
        lambda c: pickle.loads(pickle.dumps(c)),
    ],
    ids=["copy", "deepcopy", "model_copy", "model_copy-deep", "pickle"],
)
def test_copies_are_equal_and_shown_alike(twin: Any, *, is_read: bool) -> None:
    """Whether anybody asked for the defaults shows nowhere: not in ==, repr, fields set, or dumps."""
    config = RunConfig(run_id="r")
    if is_read:
        for field in FIELDS:
            getattr(config, field)
    instance = twin(config)
    assert instance == config == RunConfig(run_id="r")
    assert repr(instance) == repr(config) == repr(RunConfig(run_id="r"))
    assert instance.model_fields_set == {"run_id"}
    assert instance.model_dump() == RunConfig(run_id="r").model_dump()
    nothing = {"max_tokens_total": None, "max_cost_usd": None, "max_latency_ms": None}
    assert instance.model_dump()["budget"] == nothing
    change("policy_map", instance.policy_map)
    assert RunConfig().policy_map == EXPECTED["policy_map"]


@pytest.mark.core
def test_a_run_has_what_its_config_has() -> None:
    """A context's budget, policies and hooks are its config's own objects, asked for on either side first."""
    for first in ("config", "context"):
        config = RunConfig()
        ctx = context_on(AsyncInMemoryStore(), config)
        for field in FIELDS:
            sides = {"config": config, "context": ctx}
            before = getattr(sides[first], field)
            assert getattr(ctx, field) is getattr(config, field) is before
        assert {field.name for field in dataclasses.fields(ctx)} >= set(FIELDS)


async def test_hooks_that_are_set_on_a_default_are_called() -> None:
    """Before the run; and never those of another runner."""
    events: list[str] = []

    async def start(run_id: str, *_: Any) -> None:
        await asyncio.sleep(0)
        events.append(run_id)

    ours, others = (StromaRunner.quick() for _ in range(2))
    node = ours.node("n", input=Num, output=Num)(passing())
    assert isinstance(ours.config.hooks, NodeHooks)
    ours.config.hooks.on_run_start = start
    await others.run([node], Num(), run_id="theirs")
    await ours.run([node], Num(), run_id="ours")
    assert events == ["ours"]


async def test_a_copy_of_a_config_takes_the_same_generated_id() -> None:
    """Configs that are deep copies of one another share their generated id, and only one run takes it."""
    config = RunConfig()
    twin = copy.deepcopy(config)
    assert [config.take_run_id() == config.run_id, twin.take_run_id() == twin.run_id] == [True, False]


@pytest.mark.core
@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", 5])
def test_a_pipeline_has_a_name_that_stores_can_keep(name: Any) -> None:
    """What no store can keep is refused as the name of a pipeline, where it is given."""
    with pytest.raises(ValueError, match="pipeline name"):
        Pipeline(name, [])
    with pytest.raises(ValueError, match="pipeline"):
        RunConfig(pipeline=name)


store = store_fixture(*IN_PROCESS)


@pytest.mark.core
async def test_idempotency_keys_never_collide(store: Any) -> None:
    """Every execution, run, position and child has an idempotency key of its own of 32 digits and letters."""
    keys: list[str] = []

    async def note(state: Any) -> Any:
        keys.append(current_node().idempotency_key)
        return {"n": 1}

    nodes = [node("x", note), parallel(node("y", note), parallel(node("z", note)))]
    ids = [
        "pay",
        "pay@2",
        "pay:1",
        "pay:2",
        "pay:1:0:",
        "pay:1:1:",
        "pay:1:1:0",
        "pay:2:0:",
        "pay:",
        ":",
        "1",
        "bestellung-ü€\n" * 100,
    ]
    for run_id in ids:
        for _ in range(3):
            result = await quick_without_retries(store=store).run(nodes, Num(), run_id=run_id)
            assert result.status is RunStatus.COMPLETED
    assert len(keys) == len(ids) * 9
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


@pytest.mark.core
async def test_an_idempotency_key_stays_on_retry_and_resume(store: Any) -> None:
    """All attempts at one position, those after a resume too, have the same idempotency key."""
    keys: list[str] = []

    async def a(state: Num) -> Any:
        keys.append(current_node().idempotency_key)
        if len(keys) < 5:
            raise ValueError("no")
        return {"a": 1}

    runner = quick_without_retries(store=store, run_id="pay", policy_map=TWICE)
    nodes = [node("a", a, output=One)]
    assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
    assert (await runner.run(nodes, Num(), resume=True)).final_state == One(a=1)
    assert len(keys) == 5
    assert len(set(keys)) == 1
