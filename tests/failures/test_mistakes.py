"""Mistakes in the code of nodes: what a failure says of them, and when a retry is pointless."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, FallbackPolicy, StromaRunner, parallel
from stroma.failures.mistakes import explain_mistake

PATIENT: Any = {kind: {"max_retries": 6, "backoff_seconds": 0} for kind in ("AMBIGUOUS", "RECOVERABLE")}


PASS_IT = "pass context= to run(), or set RunConfig(context=) on the pipeline or runner"


class Text(BaseModel):
    text: str | None = None


async def fail(func: Any, **config: Any) -> tuple[Any, list[int]]:
    """Run a node to its failure; return that and the numbers of its attempts."""
    runner = StromaRunner.quick(**({"policy_map": PATIENT} | config))
    result = await runner.run([runner.node("broken", input=Text, output=Text)(func)], Text())
    assert result.failure is not None
    return result.failure, [event.attempt for event in result.trace]


async def of_context(state: Any, ctx: dict[str, Any]) -> Any:
    return ctx["client"]


def in_thread(state: Any, ctx: dict[str, Any]) -> Any:
    return str(ctx["client"])


async def of_state(state: Any, ctx: dict[str, Any]) -> Any:
    return {"text": 1}["client"]


async def deeper(state: Any, ctx: dict[str, Any]) -> Any:
    return ctx["model"]["client"]


async def by_hand(state: Any, ctx: dict[str, Any]) -> Any:
    raise KeyError("client")


@pytest.mark.parametrize("func", [of_context, in_thread])
async def test_a_missing_key_of_the_context_is_named(func: Any) -> None:
    """The message of a KeyError of the context names the missing key and the present ones."""
    failure, _ = await fail(func, context={"model": {}, "db": "secret value"})
    assert failure.message == "'client'; the context has no key 'client', its keys are: 'model', 'db'"
    assert isinstance(failure.exception, KeyError)
    assert failure.exception.args == ("client",)
    failure, _ = await fail(func)
    assert failure.message == "'client'; the context has no key 'client', its keys are: none; " + PASS_IT


@pytest.mark.parametrize("func", [of_state, deeper, by_hand])
async def test_another_missing_key_is_left_alone(func: Any) -> None:
    """A KeyError of anything else than the context has its own message."""
    failure, _ = await fail(func, context={"model": {}})
    assert failure.message == "'client'"


async def test_keys_are_named_in_bounds() -> None:
    """Of many keys the first twenty are named, long ones are cut, keys of odd types go by their type."""
    context: Any = {"k" * 500: 1, (1, 2): 2} | {f"key {n}": n for n in range(100)}
    failure, _ = await fail(of_context, context=context)
    assert len(failure.message) < 500
    assert "<tuple>, 'key 0'" in failure.message
    assert failure.message.endswith("'key 17' and 82 more")


async def test_the_keys_beside_a_fallback_model() -> None:
    """While a fallback model is due the keys of the context are named as well."""
    failure, _ = await fail(
        of_context,
        context={"db": 1},
        budget={"max_cost_usd": 1e-9},
        model_fallbacks=[FallbackPolicy(preferred_model="a", fallback_model="b", at_budget_pct=0.0)],
    )
    assert failure.message.endswith("'client'; the context has no key 'client', its keys are: 'db'")


async def attribute(state: Any, ctx: Any) -> Any:
    return ctx.client


async def test_a_context_of_another_class_is_named() -> None:
    """The message of a context that was not passed, or is a dict, says where to pass it."""
    failure, _ = await fail(attribute)
    wrong = "'dict' object has no attribute 'client'; the context is a dict, its keys are: "
    assert failure.message == f"{wrong}none; {PASS_IT}"
    failure, _ = await fail(attribute, context={"client": 1})
    assert failure.message == f"{wrong}'client'; {PASS_IT}"


async def on_none(state: Any) -> Any:
    return {"text": state.text.upper()}


def on_none_in_thread(state: Any) -> Any:
    return {"text": state.text[0]}


async def wrong_call(state: Any) -> Any:
    return on_none_in_thread(state, state)


@pytest.mark.parametrize("func", [on_none, on_none_in_thread, wrong_call])
@pytest.mark.parametrize("place", ["node", "child"])
async def test_the_same_bug_twice_is_not_tried_a_third_time(
    func: Any, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A TypeError or AttributeError at the same line with the same text ends after two attempts."""
    caplog.set_level("INFO", "stroma")
    policies = {"broken": {"AMBIGUOUS": FailurePolicy(max_retries=9, backoff_seconds=0)}}
    runner = StromaRunner.quick(policy_map=PATIENT, node_policies=policies)
    node = runner.node("broken", input=Text, output=Text)(func)
    nodes: list[Any] = [node] if place == "node" else [parallel(node)]
    result = await runner.run(nodes, Text())
    failure = result.failure
    assert failure.failure_class is FailureClass.AMBIGUOUS
    assert failure.message.endswith("; this is probably a bug in the node")
    assert failure.message.startswith(str(failure.exception))
    assert (failure.inner or failure).attempt == 2
    assert "node 'broken' stopped: two attempts failed in the same way" in caplog.text


async def test_another_text_or_line_is_tried_again() -> None:
    """What changes from attempt to attempt is tried as often as the policy says."""
    calls: list[int] = []

    async def changes(state: Any) -> Any:
        calls.append(1)
        if len(calls) % 2:
            return state.text + len(calls) * "x"
        return getattr(None, f"name{len(calls)}")

    _, attempts = await fail(changes)
    assert attempts == [1, 2, 3, 4, 5, 6, 7]


async def test_what_is_raised_on_purpose_or_by_a_library_is_no_bug_of_the_node() -> None:
    """A TypeError out of a library or a `raise`, and any other exception, follows the policy."""

    async def in_library(state: Any) -> Any:
        return json.dumps(object())

    async def own(state: Any) -> Any:
        raise ValueError("odd answer")

    async def raised(state: Any) -> Any:
        raise TypeError("odd answer")

    async def raised_again(state: Any) -> Any:
        try:
            return json.dumps(object())
        except TypeError as error:
            raise error

    for func in (in_library, own, raised, raised_again):
        failure, attempts = await fail(func)
        assert "bug" not in failure.message
        assert len(attempts) == 7


async def test_a_classifier_has_the_last_word() -> None:
    """A TypeError that a classifier calls RECOVERABLE is no bug."""
    failure, attempts = await fail(on_none, classifiers=[lambda error, where: FailureClass.RECOVERABLE])
    assert "bug" not in failure.message
    assert len(attempts) == 7


async def test_an_exception_without_a_traceback_is_explained_by_nothing() -> None:
    """An exception that was never raised adds nothing to a message."""
    failure, _ = await fail(on_none)
    for error in (TypeError("x"), KeyError("x"), KeyError()):
        assert explain_mistake(type(failure)(error, FailureClass.AMBIGUOUS, "a", 1, "x"), {}) == ""


async def test_the_cause_of_a_failed_connection_is_named() -> None:
    """If a client hides why a connection failed, the message has the innermost cause, such as the address."""

    async def ask(state: Any) -> Any:
        try:
            raise ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 9)")
        except OSError as error:
            raise ConnectionError("Connection error.") from error

    failure, _ = await fail(ask)
    assert failure.message == (
        "Connection error. (ConnectionRefusedError: [Errno 111] Connect call failed ('127.0.0.1', 9))"
    )
