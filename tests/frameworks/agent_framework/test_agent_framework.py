"""Microsoft Agent Framework: real agents with and without the guard, with a fake client and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agent_framework import (
    Agent,
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    ChatResponseUpdate,
    Content,
    FunctionInvocationLayer,
    FunctionMiddleware,
    Message,
    MiddlewareTermination,
    ResponseStream,
    tool,
)
from pydantic import BaseModel
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import Guard, UnknownNode
from stroma.adapters.agent_framework import stroma_middleware

KINDS = ["run", "stream"]
CALL = ("weather", '{"city": "Oslo"}')


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class Script(FunctionInvocationLayer, ChatMiddlewareLayer, BaseChatClient):  # type: ignore[misc]
    """Answers: a text, or (tool name, JSON arguments); what is an exception, it raises."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        super().__init__()
        self.answers, self.tokens, self.break_after = list(answers), tokens, break_after
        self.asked: list[Any] = []

    def _next(self, messages: Any) -> Any:
        self.asked.append(list(messages))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return Content.from_function_call(f"call{len(self.asked)}", answer[0], arguments=answer[1])
        return Content.from_text(answer)

    def _inner_get_response(self, *, messages: Any, stream: bool, options: Any, **_: Any) -> Any:
        usage: Any = {"input_token_count": self.tokens - 1, "output_token_count": 1}

        async def whole() -> Any:
            message = Message("assistant", [self._next(messages)])
            return ChatResponse(messages=[message], response_id="1", model="gpt-4o", usage_details=usage)

        async def parts() -> Any:
            content = self._next(messages)
            words = content.text.split() if content.type == "text" else [None]
            for n, word in enumerate(words):
                if n == self.break_after:
                    raise TimeoutError("lost")
                part = content if word is None else Content.from_text(word + " ")
                yield ChatResponseUpdate(contents=[part], role="assistant", model="gpt-4o")
            yield ChatResponseUpdate(contents=[Content.from_usage(usage)], role="assistant", model="gpt-4o")

        return ResponseStream(parts(), finalizer=ChatResponse.from_updates) if stream else whole()


@tool(approval_mode="never_require")
def weather(city: str) -> Any:
    """The weather of a city."""
    return {"celsius": len(city)}


def agent_of(
    script: Script, guard: Guard | None = None, tools: Any = (weather,), contracts: Any = None
) -> Any:
    middleware = None if guard is None else stroma_middleware(guard, contracts)
    return Agent(script, name="forecaster", tools=list(tools), middleware=middleware)


def ask(agent: Any, kind: str = "run", seen: Any = None) -> str:
    async def main() -> str:
        if kind == "run":
            return str((await agent.run("hello")).text).strip()
        stream = agent.run("hello", stream=True)
        async for part in stream:
            if seen is not None and part.text:
                seen.append(part.text.strip())
        return str((await stream.get_final_response()).text).strip()

    return asyncio.run(main())


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


@holds("same answer")
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    plain, guarded, guard = Script(CALL, "It is 4 C"), Script(CALL, "It is 4 C"), guard_of()
    expected = ask(agent_of(plain), kind)
    assert (
        ask(agent_of(guarded, guard, contracts={"weather": (City, Weather)}), kind) == expected == "It is 4 C"
    )
    assert [[m.role for m in messages] for messages in guarded.asked] == [
        [m.role for m in messages] for messages in plain.asked
    ]
    assert lines_of(guard) == [
        "forecaster success",
        "  model success 10",
        "  weather success",
        "  model success 10",
    ]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.COMPLETED
    assert guard.last.result.total_cost_usd > 0


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_tool(kind: str) -> None:
    """G1: out of the agent, and not told to the model, as the framework would by itself."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        script = Script(CALL, "done")
        with pytest.raises(ContractViolation) as caught:
            ask(agent_of(script, guard, contracts={"weather": contract}), kind)
        assert (caught.value.node_id, caught.value.direction) == ("weather", direction)
        assert len(script.asked) == 1
        assert guard.stopped is not None
        assert guard.stopped.exception is caught.value


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    script = Script(TimeoutError("slow"), ("flaky", "{}"), ConnectionError("gone"), "done")
    errors: list[Exception] = [TimeoutError(), TimeoutError()]

    @tool(approval_mode="never_require")
    def flaky() -> str:
        """Fails twice."""
        pay()
        if errors:
            raise errors.pop()
        return "fine"

    guard = guard_of()
    assert ask(agent_of(script, guard, [flaky]), kind) == "done"
    assert (len(script.asked), len(errors)) == (4, 0)
    assert result_of(guard).total_tokens == 20 + 3 * PAID
    script = Script(PermissionError("no"), "never")
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PermissionError):
        ask(agent_of(script, guard), kind)
    assert len(script.asked) == 1
    assert guard.stopped is not None
    assert guard.stopped.node_id == "model"


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_agent_to_the_token(kind: str) -> None:
    script = Script(*[CALL] * 9)
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    with pytest.raises(BudgetExceeded) as caught:
        ask(agent_of(script, guard), kind)
    assert (caught.value.actual, caught.value.limit, len(script.asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (30, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_trips_inside_a_tool_stops_the_agent_too(kind: str) -> None:
    """An agent in a tool: the framework would tell the model of the error and go on spending."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    inner = agent_of(Script("deep", tokens=7), guard, ())

    @tool(approval_mode="never_require")
    async def ask_inner() -> str:
        """Ask the other one."""
        return str((await inner.run("x")).text)

    script = Script(("ask_inner", "{}"), *["more"] * 5)
    with pytest.raises(BudgetExceeded):
        ask(agent_of(script, guard, [ask_inner]), kind)
    assert len(script.asked) == 1
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 17


@holds("hooks")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_in_order_with_the_right_parents(kind: str) -> None:
    seen = Seen()
    ask(agent_of(Script(TimeoutError(), CALL, "done"), guard_of(seen)), kind)
    assert seen.lines == [
        "run start",
        "start forecaster",
        "start model < forecaster",
        "failure model < forecaster",
        "retry model < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "start weather < forecaster",
        "success weather < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "success forecaster",
        "run end COMPLETED",
    ]


def test_a_tool_that_fails_for_good_is_told_to_the_model_as_ever() -> None:
    calls: list[int] = []

    @tool(approval_mode="never_require")
    def broken() -> str:
        """Never works."""
        calls.append(1)
        raise LookupError("no such thing")

    for guard in (None, guard_of()):
        calls.clear()
        assert ask(agent_of(Script(("broken", "{}"), "without it"), guard, [broken])) == "without it"
        assert len(calls) == (1 if guard is None else 2)


@holds("streams")
def test_a_stream_is_not_retried_after_its_first_part() -> None:
    """Rule 9."""
    seen: list[str] = []
    script = Script("one two three", "again", break_after=2)
    with pytest.raises(TimeoutError, match="lost"):
        ask(agent_of(script, guard_of()), "stream", seen)
    assert (seen, len(script.asked)) == (["one", "two"], 1)


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        ask(agent_of(Script("x"), guard_of(), contracts={"wether": (City, Weather)}))


@holds("journal")
def test_a_call_of_an_agent_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        ask(agent_of(Script(CALL, "done"), guard_of(store=store)))
        (record,) = store.list_runs()
        assert (record.status, record.tokens) == ("COMPLETED", 20)
        nodes = [a.node_id for a in store.attempts(record.run_id)]
        assert nodes == ["forecaster", "model", "weather", "model"]


class Cached(FunctionMiddleware):
    """Answers in place of the tool, and ends there: as the framework has it for caches and guards of one's own."""

    async def process(self, context: Any, call_next: Any) -> None:
        context.result = {"celsius": 99}
        raise MiddlewareTermination("it is known", result=context.result)


@pytest.mark.parametrize("first", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", KINDS)
@holds("control flow")
def test_middleware_that_terminates_ends_what_is_under_way_as_ever(kind: str, first: bool) -> None:
    """Of one's own, before or after the guard's: it is no failure, nothing is tried again, and the answer is the same."""
    answers = []
    for guard in (None, guard_of()):
        script = Script(CALL, "It is 99 C")
        own = [] if guard is None else stroma_middleware(guard)
        agent = Agent(
            script,
            name="forecaster",
            tools=[weather],
            middleware=[Cached(), *own] if first else [*own, Cached()],
        )
        answers.append((ask(agent, kind), len(script.asked)))
        if guard is not None:
            assert guard.stopped is None
            assert result_of(guard).status is RunStatus.COMPLETED
            assert not [line for line in tree(result_of(guard)) if "failure" in line]
    assert answers[0] == answers[1]


@holds("control flow")
def test_a_tool_that_needs_approval_is_asked_for_and_goes_on() -> None:
    """The request for an approval comes out as ever, nothing has failed, and the tool is called once it is given."""
    calls: list[str] = []

    @tool(approval_mode="always_require")
    def delete(path: str) -> str:
        """Deletes."""
        calls.append(path)
        return "gone"

    async def talk(agent: Any) -> list[Any]:
        session = agent.create_session()
        asked = await agent.run("delete a", session=session)
        (request,) = asked.user_input_requests
        before = list(calls)
        approved = request.to_function_approval_response(approved=True)
        done = await agent.run(Message("user", [approved]), session=session)
        return [request.function_call.name, before, done.text]

    told = []
    for guard in (None, guard_of()):
        calls.clear()
        agent = agent_of(Script(("delete", '{"path": "a"}'), "done"), guard, [delete])
        told.append((asyncio.run(talk(agent)), list(calls)))
        if guard is not None:
            assert guard.stopped is None
            assert [line.split()[0] for line in tree(result_of(guard))] == ["forecaster", "delete", "model"]
    assert told[0] == told[1] == (["delete", [], "done"], ["a"])
