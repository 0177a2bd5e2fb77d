"""The context dict while a fallback model is due."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from tests.kit import Num, One, node, quick_without_retries

from stroma import ExecutionBudget


class User(BaseModel):
    user: str


async def in_node(own: dict[str, Any], look: Callable[[Any], Any]) -> Any:
    """What ``look`` makes of the context dict that a node gets while a fallback for it is due."""
    runner = quick_without_retries(budget=ExecutionBudget(max_cost_usd=1), context=own).with_model_fallback(
        "gpt-4o", to="small", at_budget_pct=0
    )
    seen: list[Any] = []

    async def a(state: Num, ctx: Any) -> Any:
        seen.append(look(ctx))
        return {"a": 1}

    result = await runner.run([node("a", a, output=One)], Num())
    result.raise_for_status()
    return seen[0]


FULL = {"user": "u", "_stroma_model": "small"}


READERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "json": (lambda ctx: json.loads(json.dumps(ctx)), FULL),
    "indented json": (lambda ctx: json.loads(json.dumps(ctx, indent=1, sort_keys=True)), FULL),
    "dict": (dict, FULL),
    "**": (lambda ctx: {**ctx}, FULL),
    "keywords": (lambda ctx: (lambda **mapping: mapping)(**ctx), FULL),
    "update": (lambda ctx: (copied := {}, copied.update(ctx))[0], FULL),
    "|": (lambda ctx: {} | ctx, FULL),
    "| first": (lambda ctx: ctx | {}, FULL),
    "copy": (copy.copy, FULL),
    ".copy": (lambda ctx: ctx.copy(), FULL),
    "deepcopy": (copy.deepcopy, FULL),
    "pickle": (lambda ctx: pickle.loads(pickle.dumps(ctx)), FULL),
    "pydantic dict": (lambda ctx: TypeAdapter(dict[str, Any]).validate_python(ctx), FULL),
    "pydantic model": (lambda ctx: User.model_validate(ctx), User(user="u")),
    "pydantic json": (lambda ctx: json.loads(TypeAdapter(Any).dump_json(ctx)), FULL),
    "reversed": (lambda ctx: list(reversed(ctx)), ["_stroma_model", "user"]),
    "list": (list, ["user", "_stroma_model"]),
    "len": (len, 2),
    "format": (lambda ctx: "{user} {_stroma_model}".format_map(ctx), "u small"),
    "repr": (lambda ctx: repr(ctx), repr(FULL)),
    "==": (lambda ctx: (ctx == FULL, ctx != FULL), (True, False)),
    "items": (lambda ctx: dict(ctx.items()), FULL),
}


@pytest.mark.parametrize("reader", READERS)
async def test_the_context_with_a_fallback_reads_like_a_dict(reader: str) -> None:
    """While a fallback is due, ctx has the model's name for all readers, the user's dict has not."""
    look, expected = READERS[reader]
    own = {"user": "u"}
    assert await in_node(own, look) == expected
    assert own == {"user": "u"}


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, dict, lambda c: pickle.loads(pickle.dumps(c))])
async def test_writes_reach_the_users_dict_and_copies_are_apart(make: Callable[[Any], Any]) -> None:
    """What a node writes to ctx is in the user's dict and in every later reading; copies are separate."""
    own: dict[str, Any] = {"user": "u", "old": 1}

    def write(ctx: Any) -> Any:
        copied = make(ctx)
        copied["lost"] = 1
        ctx["kept"] = [1]
        del ctx["old"]
        ctx |= {"more": 2, "last": 3}
        assert ctx.popitem() == ("last", 3)
        assert ctx.pop("user") == "u"
        return type(copied), json.loads(json.dumps(ctx)), TypeAdapter(dict[str, Any]).validate_python(ctx)

    now = {"kept": [1], "more": 2, "_stroma_model": "small"}
    assert await in_node(own, write) == (dict, now, now)
    assert own == {"kept": [1], "more": 2}


async def test_a_cleared_context_keeps_the_fallback() -> None:
    """A node that clears its ctx clears the user's dict, and still finds the model's name."""
    own = {"user": "u"}
    assert await in_node(own, lambda ctx: (ctx.clear(), dict(ctx))[1]) == {"_stroma_model": "small"}
    assert own == {}
