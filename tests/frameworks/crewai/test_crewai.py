"""CrewAI: real flows, LLMs and crews with and without the guard, with a fake LLM and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from crewai import Agent, BaseLLM, Crew, Task
from crewai.flow.flow import Flow, listen, router, start
from crewai.tools import BaseTool
from pydantic import BaseModel, PrivateAttr
from tests.frameworks.kit import AT_ONCE, PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    NodeContract,
    RunStatus,
    SQLiteStore,
    StromaRunner,
)
from stroma.adapters import (
    CrewAIAdapter,
    FrameworkAdapter,
    Guard,
    UnknownNode,
    stroma_crewai_step,
    what_stopped,
)
from stroma.adapters.crewai import attach, guard_llm

KINDS = ["kickoff", "kickoff_async"]


class Text(BaseModel):
    text: str


class Words(BaseModel):
    words: list[str]


class Total(BaseModel):
    total: int


class State(BaseModel):
    text: str = "a b c"
    total: int = 0


class Script(BaseLLM):
    """Answers what it is told to; what is an exception, it raises."""

    _answers: list[Any] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=10)

    @classmethod
    def of(cls, *answers: Any, tokens: int = 10) -> Script:
        made = cls(model="gpt-4o")
        made._answers, made._tokens = list(answers), tokens
        return made

    def call(self, messages: Any, *_: Any, **__: Any) -> Any:
        self._asked.append(messages)
        answer = self._answers.pop(0)
        self._track_token_usage_internal(
            {"prompt_tokens": self._tokens - 1, "completion_tokens": 1, "total_tokens": self._tokens}
        )
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def acall(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call(messages)

    def supports_function_calling(self) -> bool:
        return False


class Words3(Flow[State]):
    """Three methods, each behind the other; what they do can be replaced."""

    @start()
    def split(self) -> Any:
        return {"words": self.state.text.split()}

    @listen(split)
    async def count(self, given: Any) -> Any:
        return {"total": len(given["words"])}

    @listen(count)
    def keep(self, given: Any) -> Any:
        self.state.total = given["total"]


def run(flow: Any, kind: str = "kickoff") -> Any:
    return flow.kickoff() if kind == "kickoff" else asyncio.run(flow.kickoff_async())


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


CONTRACTS = {"split": (Text, Words), "count": (Words, Total), "keep": (Total, State)}


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    """Sync and async methods; a method that returns nothing is judged by the state it leaves."""
    plain, guarded, guard = Words3(), Words3(), guard_of()
    attach(guarded, guard, CONTRACTS)
    assert run(guarded, kind) == run(plain, kind)
    assert guarded.state.total == plain.state.total == 3
    assert lines_of(guard) == ["split success", "count success", "keep success"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.COMPLETED
    assert guard.last.result.trace._events[2].output_state is not None
    assert guard.last.result.trace._events[2].output_state["total"] == 3


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_method(kind: str) -> None:
    """G1: in a flow, where the published adapter let everything pass."""

    class Bad(Words3):
        @start()
        def split(self) -> Any:
            return {"words": 7}

        @listen(split)
        async def count(self, given: Any) -> Any:
            called.append(1)

    called: list[int] = []
    guard = guard_of()
    with pytest.raises(ContractViolation) as caught:
        run(attach(Bad(), guard, {"split": (Text, Words)}), kind)
    assert (caught.value.node_id, caught.value.direction) == ("split", "output")
    with pytest.raises(ContractViolation) as caught:
        run(attach(Bad(), guard, {"count": (Words, Total)}), kind)
    assert (caught.value.node_id, caught.value.direction, called) == ("count", "input", [])
    assert guard.stopped is not None
    assert guard.stopped.exception is caught.value


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    calls: list[int] = []

    class Flaky(Flow[State]):
        @start()
        def begin(self) -> Any:
            pay()
            calls.append(1)
            if len(calls) < 3:
                raise TimeoutError("slow")
            return "done"

    guard = guard_of()
    assert run(attach(Flaky(), guard), kind) == "done"
    assert len(calls) == 3
    assert result_of(guard).total_tokens == 3 * PAID

    class Broken(Flow[State]):
        @start()
        def begin(self) -> Any:
            calls.append(1)
            raise PermissionError("no")

    calls.clear()
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PermissionError):
        run(attach(Broken(), guard), kind)
    assert len(calls) == 1
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.FAILED


def asking(llm: Script, times: int = 1) -> Any:
    class Asking(Flow[State]):
        @start()
        def ask(self) -> Any:
            return [llm.call("x") for _ in range(times)][-1]

        @listen(ask)
        async def ask_again(self, given: Any) -> Any:
            return await llm.acall("y")

    return Asking()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_counted_once_where_they_are_used(kind: str) -> None:
    """LLM calls inside methods, failed ones too: they are in the bill to the token, at the innermost step."""
    guard = guard_of()
    llm = guard_llm(Script.of(TimeoutError(), "one", "two"), guard)
    assert guard_llm(llm, guard) is llm
    assert run(attach(asking(llm), guard), kind) == "two"
    assert lines_of(guard) == [
        "ask success", "  llm failure 10", "  llm success 10", "ask_again success", "  llm success 10",
    ]  # fmt: skip
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 30
    assert guard.last.result.total_cost_usd > 0


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_flow_to_the_token(kind: str) -> None:
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    llm = guard_llm(Script.of(*["more"] * 9), guard)
    with pytest.raises(BudgetExceeded) as caught:
        run(attach(asking(llm, 5), guard), kind)
    assert (caught.value.actual, caught.value.limit, len(llm._asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (30, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


def test_an_llm_that_many_share_is_counted_to_the_token() -> None:
    """One counter in the LLM, many calls at once."""
    guard = guard_of()
    llm = guard_llm(Script.of(*["x"] * 200), guard)

    async def main() -> None:
        async with guard.run():
            await asyncio.gather(
                *(asyncio.to_thread(llm.call, "x") for _ in range(100)), *(llm.acall("x") for _ in range(100))
            )

    asyncio.run(main())
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 2000


@holds("hooks")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_in_order_with_the_right_parents(kind: str) -> None:
    seen = Seen()
    guard = guard_of(seen)
    run(attach(asking(guard_llm(Script.of(TimeoutError(), "one", "two"), guard)), guard), kind)
    assert seen.lines == [
        "run start",
        "start ask",
        "start llm < ask",
        "failure llm < ask",
        "retry llm < ask",
        "start llm < ask",
        "success llm < ask",
        "success ask",
        "start ask_again",
        "start llm < ask_again",
        "success llm < ask_again",
        "success ask_again",
        "run end COMPLETED",
    ]


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_routers_route(kind: str) -> None:
    """What a router returns decides, as it did; methods that are not taken are no steps."""

    class Routed(Flow[State]):
        @start()
        def begin(self) -> Any:
            return 3

        @router(begin)
        def decide(self, given: int) -> str:
            return "is odd" if given % 2 else "is even"

        @listen("is odd")
        def odd(self) -> str:
            return "was odd"

        @listen("is even")
        def even(self) -> str:
            return "was even"

    guard = guard_of()
    assert run(attach(Routed(), guard), kind) == run(Routed(), kind) == "was odd"
    assert lines_of(guard) == ["begin success", "decide success", "odd success"]


@holds("unknown")
def test_a_contract_for_an_unknown_method_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no method 'splitt' .* 'split'"):
        attach(Words3(), guard_of(), {"splitt": (Text, Words)})


@holds("journal")
def test_a_kickoff_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        attach(Words3(), guard_of(store=store)).kickoff()
        (record,) = store.list_runs()
        assert (record.status, record.nodes) == ("COMPLETED", 3)
        assert [a.node_id for a in store.attempts(record.run_id)] == ["split", "count", "keep"]


# ---------------------------------------------------------------------- crews


class Weather(BaseTool):
    name: str = "weather"
    description: str = "The weather of a city."

    def _run(self, city: str) -> str:
        return f"{len(city)} C"


class City(BaseModel):
    city: str


class Degrees(BaseModel):
    celsius: int


ACTION = 'Thought: look\nAction: weather\nAction Input: {"city": "Oslo"}'
ANSWER = "Thought: I know\nFinal Answer: It is 4 C"


def crew_of(llm: Script) -> Crew:
    agent = Agent(role="forecaster", goal="tell", backstory="knows", llm=llm, tools=[Weather()], max_iter=5)
    task = Task(description="What is the weather?", expected_output="degrees", agent=agent)
    return Crew(agents=[agent], tasks=[task])


@holds("same answer", "sync and async")
def test_a_crew_gives_the_same_answer_with_and_without_the_guard() -> None:
    """LLM, tool, LLM: steps of one run."""
    guard = guard_of()
    plain = crew_of(Script.of(ACTION, ANSWER)).kickoff()
    guarded = attach(crew_of(Script.of(ACTION, ANSWER)), guard, {"weather": (City, Text)}).kickoff()
    assert guarded.raw == plain.raw == "It is 4 C"
    assert lines_of(guard) == ["llm success 10", "weather success", "llm success 10"]


def test_a_crew_is_stopped_by_the_budget_though_its_loop_calls_again() -> None:
    """CrewAI calls its LLM again after an error: no such call is made, and the guard says what stopped it."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    llm = Script.of(*[ACTION] * 20)
    with pytest.raises(Exception) as caught:
        attach(crew_of(llm), guard).kickoff()
    assert len(llm._asked) == 2
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 20
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        attach(crew_of(Script.of()), guard_of(), {"wether": (City, Degrees)})


# ---------------------------------------------------------------------- the published names


SPLIT = NodeContract(node_id="splitter", input_schema=Text, output_schema=Words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["below", "above"])
def test_code_against_the_published_names_works(kind: str, where: str) -> None:
    """CrewAIAdapter(registry).wrap(flow) and the decorator, below @start or above it, on real flows."""
    words: list[Any] = [["a"], 7]

    def split(self: Any) -> Any:
        return {"words": words.pop(0)}

    step = stroma_crewai_step("splitter", SPLIT)
    decorated = start()(step(split)) if where == "below" else step(start()(split))  # type: ignore[type-var]
    kind_of_flow: Any = type("Marked", (Flow[State],), {"split": decorated, "__module__": __name__})
    adapter = CrewAIAdapter(ContractRegistry(), StromaRunner.quick(policy_map=AT_ONCE))
    assert isinstance(adapter, FrameworkAdapter)
    assert run(adapter.wrap(kind_of_flow()), kind) == {"words": ["a"]}
    with pytest.raises(ContractViolation) as caught:
        run(adapter.wrap(kind_of_flow()), kind)
    assert (caught.value.node_id, caught.value.direction) == ("splitter", "output")
    assert lines_of(adapter.guard) == ["splitter failure"]


def test_a_flow_without_marks_is_an_error() -> None:
    adapter = CrewAIAdapter(ContractRegistry())
    with pytest.raises(ValueError, match="stroma_crewai_step"):
        adapter.wrap(Words3())
    with pytest.raises(TypeError, match="is no flow"):
        adapter.wrap(Words3)
    assert adapter.node_decorator("splitter", SPLIT)(lambda self: None)._stroma_node_id == "splitter"
