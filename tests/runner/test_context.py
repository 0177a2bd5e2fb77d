"""The context of a run: any object, which nodes receive as it is."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr
from tests.kit import NEVER, Num

from stroma import FallbackPolicy, Pipeline, StromaRunner, Usage, current_node, stroma_node
from stroma.testing import assert_resumable


@dataclass
class Deps:
    """What nodes share; a copy of it raises."""

    key: SecretStr = field(default_factory=lambda: SecretStr("sk-deps-0123456789"))
    seen: list[Any] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the context was copied")

    __copy__ = __deepcopy__


@stroma_node
async def look(state: Num, ctx: Deps) -> Num:
    ctx.seen.append(ctx)
    return state


def runner_of(deps: Deps, **options: Any) -> StromaRunner[Deps]:
    return StromaRunner[Deps].quick(policy_map=NEVER, context=deps, **options)


async def test_nodes_receive_the_object_itself() -> None:
    """``ctx`` is the object of quick(), with_context() or run(), of any class, and not a copy."""
    contexts = first, second, third = Deps(), Deps(), Deps()
    runner = runner_of(first)
    await runner.run([look], Num())
    await runner.run([look], Num(), context=second)
    await runner.with_context(third).run([look], Num())
    assert all(len(one.seen) == 1 and one.seen[0] is one for one in contexts)


async def test_tests_pass_the_object_itself() -> None:
    """assert_resumable() passes the context of the runner, and does not copy it."""
    deps = Deps()
    await assert_resumable(Pipeline("p", [look]), Num(), runner=runner_of(deps), processes=False)
    assert all(one is deps for one in deps.seen)


async def test_secrets_of_the_object_are_masked() -> None:
    """A secret in an attribute of the context does not appear in the message of a failure."""

    @stroma_node
    async def leak(state: Num, ctx: Deps) -> Num:
        raise ValueError(f"denied for {ctx.key.get_secret_value()}")

    result = await runner_of(Deps()).run([leak], Num())
    assert result.failure is not None
    assert "sk-deps" not in str(result.failure)
    assert "denied for" in str(result.failure)


async def test_a_fallback_model_beside_an_object() -> None:
    """A due fallback model is at current_node().model; only a dict also gets a key for it."""
    models: list[str | None] = []

    @stroma_node
    async def spend(state: Num, ctx: Deps) -> tuple[Num, Usage]:
        models.append(current_node().model)
        assert isinstance(ctx, Deps)
        return state, Usage(input_tokens=1, cost_usd=0.9)

    runner = runner_of(Deps(), model_fallbacks=[FallbackPolicy("large", "small")]).with_budget(cost_usd=1.0)
    await runner.run([spend, look, spend], Num())
    assert models == [None, "small"]
