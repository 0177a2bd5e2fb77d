"""Pipelines that every driver must do the same with."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import BaseModel
from tests.kit import NEVER, THRICE, Num, Positive, Text, Words, bare, node, recording

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    FallbackPolicy,
    RunStatus,
    current_node,
    map_over,
    parallel,
)
from stroma.cost import KNOWN_MODELS


class Left(BaseModel):
    left: int


class Right(BaseModel):
    right: int


class Both(BaseModel):
    left: int
    right: int


class Texts(BaseModel):
    texts: list[str]


class Length(BaseModel):
    length: int


class End(NamedTuple):
    """How a run ends. ``calls``: the ids of the nodes, as words, as they are called."""

    status: RunStatus
    calls: str
    final: dict[str, Any]
    failure: tuple[FailureClass, str] | None = None


def completed(calls: str, final: dict[str, Any]) -> End:
    return End(RunStatus.COMPLETED, calls, final)


def partial(calls: str, final: dict[str, Any], failure_class: FailureClass, error: str) -> End:
    return End(RunStatus.PARTIAL, calls, final, (failure_class, error))


def failed(calls: str, final: dict[str, Any], error: str) -> End:
    return End(RunStatus.FAILED, calls, final, (FailureClass.TERMINAL, error))


@dataclass
class Scenario:
    """What is run, and what becomes of it. ``make`` is called for each run to count calls anew."""

    make: Callable[[list[str]], list[Any]]
    end: End
    state: BaseModel = field(default_factory=Num)
    config: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


def counted(calls: list[str], node_id: str, by: int = 1, **schemas: Any) -> Any:
    return node(node_id, recording(calls, node_id, lambda state: {"n": state.n + by}), **schemas)


def failing(calls: list[str], node_id: str, *errors: Any, tokens: int = 0) -> Any:
    """Raises these, one in each attempt, and then works."""

    async def func(state: Num) -> Any:
        calls.append(node_id)
        number = calls.count(node_id)
        if tokens:
            current_node().report_usage(input_tokens=tokens)
        if number <= len(errors):
            raise errors[number - 1]
        return {"n": state.n + 1}

    return node(node_id, func)


def spending(calls: list[str], node_id: str, tokens: int, model: str | None = None) -> Any:
    return node(node_id, recording(calls, node_id, lambda state: ({"n": state.n + 1}, tokens, 0, model)))


def giving(calls: list[str], node_id: str, *outputs: Any) -> Any:
    """Gives these, one in each attempt."""
    return node(node_id, recording(calls, node_id, lambda _: outputs[calls.count(node_id) - 1]))


def half(calls: list[str], node_id: str, name: str, promised: type[BaseModel]) -> Any:
    return node(node_id, recording(calls, node_id, lambda state: {name: state.n + 1}), Num, promised)


def joined(calls: list[str]) -> Any:
    return node("join", recording(calls, "join", lambda state: {"n": state.left + state.right}), Both, Num)


def lengths(calls: list[str]) -> Any:
    return node("length", recording(calls, "length", lambda state: {"length": len(state.text)}), Text, Length)


class Word(BaseModel):
    word: str


def measuring(
    calls: list[str], *, failing_at: str | None = None, failing_once: str | None = None
) -> list[Any]:
    """Three nodes: the second one doubles what the first one has doubled, and fails where it is told to."""

    read = recording(calls, "read", lambda state: ({"word": state.text * 2}, 5))
    length = recording(calls, "length", lambda state: {"length": len(state.word)})

    async def doubled(state: Word) -> Any:
        calls.append("doubled")
        half = state.word[: len(state.word) // 2]
        if half == failing_at or (half == failing_once and current_node().attempt == 1):
            raise ValueError(f"{half} is too long")
        return {"word": state.word * 2}, 5

    doubler = node("doubled", doubled, Word, Word)
    return [node("read", read, Text, Word), doubler, node("length", length, Word, Length)]


def branching(calls: list[str]) -> list[Any]:
    """A node, a map beside another node, and a node that joins what they made."""

    class Parts(BaseModel):
        words: list[str]
        lengths: list[Length]
        word: str

    def total(state: Parts) -> dict[str, int]:
        return {"length": sum(one.length for one in state.lengths) + len(state.word)}

    split = recording(calls, "split", lambda state: {"words": [state.text, state.text * 2]})
    first = recording(calls, "first", lambda state: {"word": state.words[0]})
    lengths_of = map_over("words", lengths(calls), into="lengths")
    both = parallel(lengths_of, node("first", first, Words, Word), max_concurrency=1)
    return [
        node("split", split, Text, Words),
        both,
        node("sum", recording(calls, "sum", total), Parts, Length),
    ]


def endless(calls: list[str], node_id: str, output: type[BaseModel] = Num) -> Any:
    async def func(state: Num) -> Any:
        calls.append(node_id)
        await asyncio.Event().wait()

    return node(node_id, func, Num, output)


def failing_beside(calls: list[str], node_id: str, other: str) -> Any:
    """Fails once the other one has begun."""

    async def func(state: Num) -> dict[str, int]:
        calls.append(node_id)
        while other not in calls:
            await asyncio.sleep(0.01)
        raise ValueError("no half")

    return node(node_id, func, Num, Left)


# USD for each token would be a lot: these are for 1,000 tokens.
KNOWN_MODELS.setdefault("a-dear-one", (1.0, 2.0))


AMBIGUOUS, RECOVERABLE, TERMINAL = FailureClass.AMBIGUOUS, FailureClass.RECOVERABLE, FailureClass.TERMINAL

SCENARIOS: dict[str, Scenario] = {
    "a chain": Scenario(
        lambda calls: [counted(calls, "a"), counted(calls, "b", 10)], completed("a b", {"n": 11})
    ),
    "one node at two positions": Scenario(
        lambda calls: [counted(calls, "a")] * 2, completed("a a", {"n": 2})
    ),
    "no nodes": Scenario(lambda calls: [], completed("", {"n": 0})),
    "bad input": Scenario(
        lambda calls: [counted(calls, "a", input=Positive)], failed("", {"n": 0}, "ContractViolation")
    ),
    "bad input half-way": Scenario(
        lambda calls: [counted(calls, "a", -1), counted(calls, "b", input=Positive)],
        failed("a", {"n": -1}, "ContractViolation"),
    ),
    "bad output": Scenario(
        lambda calls: [giving(calls, "a", {"n": "many"})], failed("a", {"n": 0}, "ContractViolation")
    ),
    "a repaired output": Scenario(
        lambda calls: [giving(calls, "a", {"n": "many"}, {"n": "some"}, {"n": 7})],
        completed("a a a", {"n": 7}),
        config={"contract_retries": {"a": 2}, "policy_map": THRICE},
    ),
    "an output that is not mended": Scenario(
        lambda calls: [giving(calls, "a", {"n": "many"}, {"n": "some"}, {"n": 7})],
        failed("a a", {"n": 0}, "ContractViolation"),
        config={"contract_retries": {"a": 1}, "policy_map": THRICE},
    ),
    "a retry": Scenario(
        lambda calls: [failing(calls, "a", TimeoutError("slow"), ValueError("odd"))],
        completed("a a a", {"n": 1}),
        config={"policy_map": THRICE},
    ),
    "retries used up": Scenario(
        lambda calls: [failing(calls, "a", *[ValueError("odd")] * 9), counted(calls, "b")],
        partial("a a a a", {"n": 0}, AMBIGUOUS, "ValueError"),
        config={"policy_map": THRICE},
    ),
    "one count for all classes": Scenario(
        lambda calls: [failing(calls, "a", TimeoutError("slow"), TimeoutError("slow"), ValueError("odd"))],
        partial("a a a", {"n": 0}, AMBIGUOUS, "ValueError"),
        config={
            "policy_map": {
                RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=0),
                AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0),
            }
        },
    ),
    "a policy of its own": Scenario(
        lambda calls: [failing(calls, "a", *[ValueError("odd")] * 9)],
        partial("a a", {"n": 0}, AMBIGUOUS, "ValueError"),
        config={
            "policy_map": THRICE,
            "node_policies": {"a": {AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0)}},
        },
    ),
    "a custom class": Scenario(
        lambda calls: [failing(calls, "a", ValueError("odd"))],
        failed("a", {"n": 0}, "ValueError"),
        config={"policy_map": THRICE, "classifiers": [lambda error, context: TERMINAL]},
    ),
    "tokens and their price": Scenario(
        lambda calls: [spending(calls, "a", 100, "a-dear-one"), spending(calls, "b", 50, "a-dear-one")],
        completed("a b", {"n": 2}),
        tokens=150,
    ),
    "a model that nobody knows": Scenario(
        lambda calls: [spending(calls, "a", 100, "nobody-knows-it")], completed("a", {"n": 1}), tokens=100
    ),
    "exactly at the limit": Scenario(
        lambda calls: [spending(calls, "a", 60), spending(calls, "b", 40)],
        completed("a b", {"n": 2}),
        tokens=100,
        config={"budget": ExecutionBudget(max_tokens_total=100)},
    ),
    "over the limit in an attempt": Scenario(
        lambda calls: [spending(calls, "a", 60), spending(calls, "b", 41), counted(calls, "c")],
        partial("a b", {"n": 2}, RECOVERABLE, "BudgetExceeded"),
        tokens=101,
        config={"budget": ExecutionBudget(max_tokens_total=100), "policy_map": THRICE},
    ),
    "what failed attempts spend": Scenario(
        lambda calls: [failing(calls, "a", TimeoutError("slow"), TimeoutError("slow"), tokens=60)],
        partial("a a", {"n": 0}, RECOVERABLE, "TimeoutError"),
        tokens=120,
        config={"budget": ExecutionBudget(max_tokens_total=100), "policy_map": THRICE},
    ),
    "a fallback model": Scenario(
        lambda calls: [spending(calls, "a", 800, "a-dear-one"), telling_model(calls)],
        completed("a a-cheap-one", {"n": 1}),
        tokens=800,
        config={
            "budget": ExecutionBudget(max_cost_usd=1000.0),
            "model_fallbacks": [FallbackPolicy("a-dear-one", "a-cheap-one", 0.0)],
            "unknown_model": "warn",
        },
    ),
    "a model that nobody knows under a cost limit": Scenario(
        lambda calls: [spending(calls, "a", 100, "nobody-knows-it"), counted(calls, "b")],
        failed("a", {"n": 1}, "UsageError"),
        tokens=100,
        config={"budget": ExecutionBudget(max_cost_usd=1000.0)},
    ),
    "a mistake in the program": Scenario(
        lambda calls: [failing(calls, "a", NameError("name 'x' is not defined")), counted(calls, "b")],
        failed("a", {"n": 0}, "NameError"),
        config={"policy_map": THRICE},
    ),
    "bad usage": Scenario(
        lambda calls: [spending(calls, "a", -1), counted(calls, "b")], failed("a", {"n": 1}, "UsageError")
    ),
    "a timeout": Scenario(
        lambda calls: [endless(calls, "a")],
        partial("a", {"n": 0}, RECOVERABLE, "TimeoutError"),
        config={"node_timeouts": {"a": 50}, "policy_map": NEVER},
    ),
    "the later one wins": Scenario(
        lambda calls: [parallel(counted(calls, "a", 1), counted(calls, "b", 2))], completed("a b", {"n": 2})
    ),
    "groups in groups": Scenario(
        lambda calls: [
            parallel(
                half(calls, "l", "left", Left),
                parallel(half(calls, "r", "right", Right), half(calls, "x", "left", Left)),
            ),
            joined(calls),
        ],
        completed("join l r x", {"n": 2}),
    ),
    "a child that fails": Scenario(
        lambda calls: [
            parallel(failing_beside(calls, "l", "r"), endless(calls, "r", Right)),
            counted(calls, "b"),
        ],
        partial("l r", {"n": 0}, AMBIGUOUS, "ValueError"),
        config={"policy_map": NEVER},
    ),
    "a group that is tried again": Scenario(
        lambda calls: [
            parallel(half(calls, "l", "left", Left), flaky_half(calls, "r"), max_concurrency=1),
            joined(calls),
        ],
        completed("join l r r", {"n": 2}),
        config={"policy_map": NEVER, "node_policies": {"parallel(l, r)": THRICE}},
    ),
    "a child over the limit": Scenario(
        lambda calls: [
            parallel(
                spending(calls, "a", 60),
                spending(calls, "b", 60),
                spending(calls, "c", 60),
                max_concurrency=1,
            ),
            counted(calls, "d"),
        ],
        partial("a b", {"n": 0}, RECOVERABLE, "BudgetExceeded"),
        tokens=120,
        config={"budget": ExecutionBudget(max_tokens_total=100)},
    ),
    "no items": Scenario(
        lambda calls: [map_over("texts", lengths(calls), into="lengths")],
        completed("", {"texts": [], "lengths": []}),
        state=Texts(texts=[]),
    ),
    "items that are none": Scenario(
        lambda calls: [map_over("nothing", lengths(calls), into="lengths")],
        partial("", {"texts": ["a"]}, AMBIGUOUS, "TypeError"),
        state=Texts(texts=["a"]),
        config={"policy_map": NEVER},
    ),
    "items through several nodes": Scenario(
        lambda calls: [map_over("texts", measuring(calls), into="lengths", max_concurrency=2)],
        completed(
            "doubled doubled length length read read",
            {"texts": ["a", "bc"], "lengths": [{"length": 4}, {"length": 8}]},
        ),
        state=Texts(texts=["a", "bc"]),
        tokens=20,
    ),
    "a node in the middle of an item that is tried again": Scenario(
        lambda calls: [
            map_over("texts", measuring(calls, failing_once="bc"), into="lengths", max_concurrency=1)
        ],
        completed(
            "doubled doubled doubled length length read read",
            {"texts": ["a", "bc"], "lengths": [{"length": 4}, {"length": 8}]},
        ),
        state=Texts(texts=["a", "bc"]),
        tokens=20,
        config={"policy_map": THRICE},
    ),
    "a node in the middle of an item that fails": Scenario(
        lambda calls: [
            map_over("texts", measuring(calls, failing_at="bc"), into="lengths", max_concurrency=1)
        ],
        partial("doubled doubled length read read", {"texts": ["a", "bc", "d"]}, AMBIGUOUS, "ValueError"),
        state=Texts(texts=["a", "bc", "d"]),
        tokens=15,
        config={"policy_map": NEVER},
    ),
    "items of several nodes that fail while others go on": Scenario(
        lambda calls: [
            map_over(
                "texts",
                measuring(calls, failing_at="bc"),
                into="lengths",
                max_concurrency=1,
                on_item_failure="collect",
            )
        ],
        completed(
            "doubled doubled doubled doubled doubled doubled length length read read read",
            {
                "texts": ["a", "bc", "d"],
                "lengths": [{"length": 4}, {"length": 4}],
                "lengths_failures": [
                    {
                        "index": 1,
                        "node_id": "doubled",
                        "failure_class": FailureClass.AMBIGUOUS,
                        "message": "ValueError: bc is too long",
                        "reason": None,
                        "attempts": 4,
                    }
                ],
            },
        ),
        state=Texts(texts=["a", "bc", "d"]),
        tokens=25,
        config={"policy_map": THRICE},
    ),
    "groups and maps in the nodes of an item": Scenario(
        lambda calls: [parallel(map_over("texts", branching(calls), into="lengths", max_concurrency=1))],
        completed("first length length split sum", {"texts": ["a"], "lengths": [{"length": 4}]}),
        state=Texts(texts=["a"]),
    ),
    "a sequence over the limit": Scenario(
        lambda calls: [
            map_over("texts", measuring(calls), into="lengths", max_concurrency=1),
            counted(calls, "d"),
        ],
        partial("doubled length read read", {"texts": ["a", "bc"]}, RECOVERABLE, "BudgetExceeded"),
        state=Texts(texts=["a", "bc"]),
        tokens=15,
        config={"budget": ExecutionBudget(max_tokens_total=14)},
    ),
    "no contract": Scenario(
        lambda calls: [
            bare("a", recording(calls, "a", lambda state: {"n": state.n + 5})),
            counted(calls, "b"),
        ],
        completed("a b", {"n": 6}),
    ),
    "a sync node": Scenario(lambda calls: [in_a_thread(calls)], completed("a", {"n": 1})),
    "what one node tells the next": Scenario(
        lambda calls: [telling(calls), usage_node(calls)],
        completed("a b", {"n": 41}),
        config={"context": {"before": 1}},
    ),
}


def telling_model(calls: list[str]) -> Any:
    async def func(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append(ctx["_stroma_model"])
        return {"n": state.n}

    return node("b", func)


def flaky_half(calls: list[str], node_id: str) -> Any:
    async def func(state: Num) -> dict[str, int]:
        calls.append(node_id)
        if calls.count(node_id) == 1:
            raise ValueError("no half yet")
        return {"right": state.n + 1}

    return node(node_id, func, Num, Right)


def in_a_thread(calls: list[str]) -> Any:
    def func(state: Num) -> dict[str, int]:
        calls.append("a")
        return {"n": state.n + 1}

    return node("a", func)


def telling(calls: list[str]) -> Any:
    async def func(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append("a")
        ctx["found"] = 40
        return {"n": ctx.pop("before")}

    return node("a", func)


def usage_node(calls: list[str]) -> Any:
    async def func(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append("b")
        assert "before" not in ctx
        return {"n": state.n + ctx["found"]}

    return node("b", func)
