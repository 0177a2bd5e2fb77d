"""Names of pipelines, run ids and idempotency keys."""

import copy
import re
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import TWICE, Num, One, node, quick_without_retries
from tests.shared_stores import IN_PROCESS

from stroma import Pipeline, RunConfig, RunStatus, current_node, parallel


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
