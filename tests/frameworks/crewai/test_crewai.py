"""CrewAI: real flows, LLMs and crews with and without the guard, with a fake LLM and no network."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from crewai import LLM, Agent, BaseLLM, Crew, Process, Task
from crewai.flow.async_feedback import HumanFeedbackPending
from crewai.flow.flow import Flow, listen, router, start
from crewai.flow.human_feedback import human_feedback
from crewai.flow.persistence import persist
from crewai.flow.persistence.sqlite import SQLiteFlowPersistence
from crewai.tools import BaseTool
from pydantic import BaseModel, PrivateAttr
from tests.frameworks.contract import ANSWER, City, FrameworkContract, Narrow, Weather, weather
from tests.frameworks.kit import AT_ONCE, Seen, guard_of, holds, lines_of, result_of, spent
from tests.kit import Text, Words
from tests.providers.server import Answer, serving

from stroma import (
    BudgetExceeded,
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
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


class State(BaseModel):
    text: str = "a b c"
    total: int = 0


class Script(BaseLLM):
    """Answers what it is told to; what is an exception, it raises."""

    _answers: list[Any] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)
    _tokens: int = PrivateAttr(default=10)
    _counts: dict[str, int] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, *answers: Any, tokens: int = 10) -> Script:
        instance = cls(model="gpt-4o")
        instance._answers, instance._tokens = list(answers), tokens
        return instance

    def call(self, messages: Any, *_: Any, **__: Any) -> Any:
        self._asked.append(messages)
        answer = self._answers.pop(0)
        counts = {"prompt_tokens": self._tokens - 1, "completion_tokens": 1, "total_tokens": self._tokens}
        self._track_token_usage_internal({**counts, **self._counts})
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def acall(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call(messages)

    def supports_function_calling(self) -> bool:
        return False


class Place(BaseModel):
    city: str = "Oslo"
    told: str = ""


def forecast(llm: Script, times: int = 1, tool: Any = weather) -> Any:
    """Return a flow of a sync method and an async one that asks the model."""

    class Forecast(Flow[Place]):
        @start()
        def weather(self) -> Any:
            return tool(self.state.city)

        @listen(weather)
        async def tell(self, value: Any) -> Any:
            return [await llm.acall("x") for _ in range(times)][-1]

    return Forecast()


def run(flow: Any, kind: str = "kickoff") -> Any:
    return flow.kickoff() if kind == "kickoff" else asyncio.run(flow.kickoff_async())


@holds("sync and async")
class TestCrewAI(FrameworkContract):
    KINDS = KINDS
    GOOD = (ANSWER,)
    STEPS = ("weather success", "tell success", "  llm success 10")
    TOKENS = 10
    MODEL = "llm"
    UNKNOWN = r"unknown method 'wether'; .* 'weather'"

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script.of(*answers)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        if guard is None:
            return forecast(script, tool=tool)
        return attach(forecast(guard_llm(script, guard), tool=tool), guard, contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return run(program, kind)

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """A method of a flow, killed between two calls of its LLM."""
        llm = guard_llm(Script.of("one", "two"), guard)

        class Asking(Flow[State]):
            @start()
            def ask(self) -> Any:
                first = llm.call("x")
                die()
                return [first, llm.call("y")]

        return str(run(attach(Asking(), guard)))

    def endless(self, guard: Any) -> tuple[Any, Script]:
        script = self.script(*["more"] * 9)
        return attach(forecast(guard_llm(script, guard), 9), guard), script

    def requests(self, script: Script) -> list[Any]:
        return script._asked

    test_a_stream_is_not_retried_after_its_first_part = None


def test_a_method_that_returns_nothing_is_judged_by_the_state_it_leaves() -> None:
    class Keeping(Flow[Place]):
        @start()
        def keep(self) -> None:
            self.state.told = "kept"

    guard = guard_of()
    run(attach(Keeping(), guard, {"keep": (City, Place)}))
    (event,) = result_of(guard).trace
    assert event.output_state["told"] == "kept"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_counted_once_where_they_are_used(kind: str) -> None:
    """LLM calls inside methods, failed ones too: they are in the bill to the token, at the innermost step."""
    guard = guard_of()
    llm = guard_llm(Script.of(TimeoutError(), "one", "two"), guard)
    assert guard_llm(llm, guard) is llm
    assert run(attach(forecast(llm, 2), guard), kind) == "two"
    assert lines_of(guard) == [
        "weather success",
        "tell success",
        "  llm failure 10",
        "  llm success 10",
        "  llm success 10",
    ]
    assert result_of(guard).total_tokens == 30
    assert result_of(guard).total_cost_usd > 0


@pytest.mark.parametrize(("name", "cost"), [("cached_prompt_tokens", 0.10), ("cache_creation_tokens", 1.25)])
def test_cached_tokens_have_their_price(name: str, cost: float) -> None:
    """What CrewAI counts as read from a cache, or written to it."""
    llm = guard_llm(Script.of("one"), guard := guard_of())
    if name not in llm._token_usage:
        pytest.skip("this release does not count them")
    llm.model, llm._counts = (
        "claude-haiku-4-5",
        {"prompt_tokens": 1_000_000, "completion_tokens": 0, name: 1_000_000},
    )
    with guard.run():
        llm.call("x")
    assert result_of(guard).total_cost_usd == pytest.approx(cost)


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
    assert result_of(guard).total_tokens == 2000


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_routers_route(kind: str) -> None:
    """What a router returns decides, as it did; methods that are not taken are no steps."""

    class Routed(Flow[State]):
        @start()
        def begin(self) -> Any:
            return 3

        @router(begin)
        def decide(self, value: int) -> str:
            return "is odd" if value % 2 else "is even"

        @listen("is odd")
        def odd(self) -> str:
            return "was odd"

        @listen("is even")
        def even(self) -> str:
            return "was even"

    guard = guard_of()
    assert run(attach(Routed(), guard), kind) == run(Routed(), kind) == "was odd"
    assert lines_of(guard) == ["begin success", "decide success", "odd success"]


class Station(BaseTool):
    name: str = "weather"
    description: str = "The weather of a city."

    def _run(self, city: str) -> str:
        return f"{len(city)} C"


ACTION = 'Thought: look\nAction: weather\nAction Input: {"city": "Oslo"}'
ANSWER = "Thought: I know\nFinal Answer: It is 4 C"


def crew_of(llm: Script) -> Crew:
    agent = Agent(role="forecaster", goal="tell", backstory="knows", llm=llm, tools=[Station()], max_iter=5)
    task = Task(description="What is the weather?", expected_output="degrees", agent=agent)
    return Crew(agents=[agent], tasks=[task])


def test_a_crew_is_stopped_by_the_budget_though_its_loop_calls_again() -> None:
    """CrewAI calls its LLM again after an error: no such call is made, and the guard says what stopped it."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    llm = Script.of(*[ACTION] * 20)
    with pytest.raises(Exception) as caught:
        attach(crew_of(llm), guard).kickoff()
    assert len(llm._asked) == 2
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert result_of(guard).total_tokens == 20
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@pytest.mark.filterwarnings("ignore:.*function_calling_llm")
def test_an_llm_of_its_own_for_tools_is_guarded() -> None:
    """An agent may ask another LLM for the calls of its tools: its calls are steps too."""
    other, guard = Script.of("x"), guard_of()
    agent = Agent(role="r", goal="g", backstory="b", llm=Script.of(), function_calling_llm=other)
    attach(Crew(agents=[agent], tasks=[Task(description="d", expected_output="e", agent=agent)]), guard)
    with guard.run():
        vars(agent)["function_calling_llm"].call("x")
    assert lines_of(guard) == ["llm success 10"]


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"unknown tool 'wether'; .* 'weather'"):
        attach(crew_of(Script.of()), guard_of(), {"wether": (City, Weather)})


class Provider(Script):
    """Plays every part of a crew, and writes each request into a ledger of tokens."""

    _ledger: list[int] = PrivateAttr(default_factory=list)

    @classmethod
    def with_ledger(cls, ledger: list[int]) -> Provider:
        instance = cls(model="gpt-4o")
        instance._ledger = ledger
        return instance

    def call(self, messages: Any, *_: Any, **__: Any) -> Any:
        self._tokens = 10 + len(self._ledger) % 7
        self._ledger.append(self._tokens)
        text = messages if isinstance(messages, str) else "\n".join(m["content"] or "" for m in messages)
        self._answers = ["Thought: I know\nFinal Answer: It is 4 C"]
        delegating = re.search(r"Tool Name: (delegate.work.to.coworker)", text, re.IGNORECASE)
        if "4 C" in text.rpartition("Observation:")[2]:
            pass
        elif "extremely detailed" in text:
            plan = {"task_number": 1, "task": "forecast", "plan": "look"}
            self._answers = ["Thought: so\nFinal Answer: " + json.dumps({"list_of_plans_per_task": [plan]})]
        elif delegating is not None:
            work = {"task": "look", "context": "now", "coworker": "forecaster"}
            self._answers = [f"Thought: ask\nAction: {delegating[1]}\nAction Input: {json.dumps(work)}"]
        elif "Tool Name: weather" in text:
            self._answers = [ACTION]
        with LOCK:
            return super().call(messages)


LOCK = threading.Lock()


def agent_with(llm: Any, role: str = "forecaster", tools: Any = ()) -> Agent:
    return Agent(role=role, goal="tell", backstory="knows", llm=llm, tools=list(tools), max_iter=5)


def sequential(ledger: list[int], *, all_agents: bool = False, **options: Any) -> Crew:
    """Return a crew with a planner, a tool of a task, and an agent that only its task knows."""
    agent, outside = (
        agent_with(Provider.with_ledger(ledger)),
        agent_with(Provider.with_ledger(ledger), "editor"),
    )
    tasks = [
        Task(description="What is the weather?", expected_output="degrees", agent=agent, tools=[Station()]),
        Task(description="Edit it.", expected_output="text", agent=outside),
    ]
    if all_agents:  # CrewAI copies neither a planner's LLM nor an agent that is not listed.
        return Crew(agents=[agent, outside], tasks=tasks, **options)
    planner = Provider.with_ledger(ledger)
    return Crew(agents=[agent], tasks=tasks, planning=True, planning_llm=planner, **options)


def hierarchical(ledger: list[int]) -> Crew:
    """Return a crew whose manager delegates to an agent."""
    agent = agent_with(Provider.with_ledger(ledger), tools=[Station()])
    task = Task(description="What is the weather?", expected_output="degrees")
    llm = Provider.with_ledger(ledger)
    return Crew(agents=[agent], tasks=[task], process=Process.hierarchical, manager_llm=llm)


@pytest.mark.parametrize("make", [sequential, hierarchical])
def test_all_spend_of_a_crew_is_counted(make: Any) -> None:
    """Planner, manager, an agent outside of ``agents=``, tools of tasks: to the token of the provider."""
    plain, ledger, seen = list[int](), list[int](), Seen()
    expected = make(plain).kickoff().raw
    guard = guard_of(seen)
    assert attach(make(ledger), guard, {"weather": (City, Text)}).kickoff().raw == expected
    assert (len(ledger), spent(seen, guard)) == (len(plain), (1, sum(ledger)))
    assert [event.node_id for event in seen.results[0].trace.walk()].count("weather") == 1


def test_each_kickoff_of_a_copy_is_a_run_of_its_own() -> None:
    """kickoff_for_each() works with copies of a crew: each of them is guarded, and none is counted twice."""
    ledger, seen = list[int](), Seen()
    crew = attach(sequential(ledger, all_agents=True), guard := guard_of(seen))
    outputs = crew.kickoff_for_each([{"day": "1"}, {"day": "2"}])
    assert [output.raw for output in outputs] == ["It is 4 C"] * 2
    assert spent(seen, guard) == (2, sum(ledger))
    assert type(crew.copy().agents[0].llm) is Provider


@pytest.mark.parametrize("kind", ["name", "LLM", "own class"])
def test_the_planner_of_a_copy_is_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CrewAI makes another LLM of its settings, and one of its own class becomes the LLM of that name."""
    plan = {"task_number": 1, "task": "forecast", "plan": "look"}
    text = json.dumps({"list_of_plans_per_task": [plan]})
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    used = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    about = {"id": "1", "object": "chat.completion", "created": 0, "model": "gpt-4o-mini"}
    ledger, seen = list[int](), Seen()
    with serving() as server:
        url = server.url(Answer(body={**about, "choices": [choice], "usage": used}))
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        planner: Any = {"name": "gpt-4o-mini", "LLM": LLM(model="gpt-4o-mini"), "own class": Script.of()}[
            kind
        ]
        crew = sequential(ledger, all_agents=True, planning=True, planning_llm=planner)
        try:
            crew.copy()
        except TypeError:
            pytest.skip("this release of CrewAI cannot copy an LLM")
        attach(crew, guard := guard_of(seen)).kickoff_for_each([{"day": "1"}, {"day": "2"}])
        asked = server.calls_of(url)
    assert asked == 2
    assert spent(seen, guard) == (2, sum(ledger) + 100 * asked)


def test_fifty_flows_at_once_spend_what_the_provider_has_counted() -> None:
    """Each in its own run, whatever LLM they share; some of them with crews."""
    ledger, seen = list[int](), Seen()
    llm, guard = Provider.with_ledger(ledger), guard_of(seen)
    guard_llm(llm, guard)

    def make() -> Any:
        return attach(forecast(llm, 2), guard).kickoff_async()

    def make_crew() -> Any:
        agent = agent_with(llm, tools=[Station()])
        task = Task(description="?", expected_output="degrees", agent=agent)
        return attach(Crew(agents=[agent], tasks=[task]), guard).akickoff()

    async def main() -> None:
        await asyncio.gather(*(make() for _ in range(46)), *(make_crew() for _ in range(4)))

    asyncio.run(main())
    assert (len(ledger), spent(seen, guard)) == (100, (50, sum(ledger)))
    assert [sum(event.node_id == "llm" for event in one.trace.walk()) for one in seen.results] == [2] * 50


def test_a_crew_that_streams_is_a_run() -> None:
    """What it is called for is made while its output is read."""
    ledger, seen = list[int](), Seen()
    crew = attach(sequential(ledger, stream=True), guard := guard_of(seen))
    streaming = crew.kickoff()
    for _ in streaming:
        pass
    assert streaming.result.raw == "It is 4 C"
    assert spent(seen, guard) == (1, sum(ledger))


def test_what_is_added_later_is_guarded() -> None:
    """An agent and a tool that come after attach() are steps of the next run."""
    ledger, seen = list[int](), Seen()
    crew = attach(sequential(ledger), guard := guard_of(seen))
    late = agent_with(Provider.with_ledger(ledger), "late", [Station()])
    crew.tasks.append(Task(description="Again.", expected_output="degrees", agent=late, context=[]))
    crew.kickoff()
    assert spent(seen, guard) == (1, sum(ledger))
    assert [event.node_id for event in seen.results[0].trace.walk()].count("weather") == 2


@pytest.mark.parametrize(("contract", "direction"), [((Narrow, Text), "input"), ((City, Weather), "output")])
def test_a_broken_contract_of_a_tool_ends_the_crew(contract: Any, direction: str) -> None:
    """It is not told to the model and forgotten: no further call of an LLM or a tool is made."""
    llm, guard = Script.of(*[ACTION] * 9), guard_of()
    with pytest.raises(Exception) as caught:
        attach(crew_of(llm), guard, {"weather": contract}).kickoff()
    error = what_stopped(caught.value)
    assert isinstance(error, ContractViolation)
    assert (error.node_id, error.direction, len(llm._asked)) == ("weather", direction, 1)
    assert result_of(guard).status is RunStatus.FAILED
    assert lines_of(guard) == ["llm success 10", "weather failure"]


class Later:
    """Asks a person who will answer in another process."""

    def request_feedback(self, context: Any, flow: Any) -> str:
        raise HumanFeedbackPending(context=context)


def reviewed(folder: Any) -> Any:
    persistence = SQLiteFlowPersistence(str(folder / "flows.db"))

    @persist(persistence)
    class Reviewed(Flow[State]):
        @start()
        @human_feedback(message="Is it good?", provider=Later())
        def write(self) -> Any:
            return "a draft"

        @listen(write)
        def send(self, value: Any) -> Any:
            return f"sent after {value.feedback}"

    return Reviewed, persistence


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_waiting_for_feedback(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CrewAI's own way to wait is SUSPENDED, and its own way to answer goes on with the same run."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # Old releases make an LLM, and ask it nothing.
    made, persistence = reviewed(tmp_path)
    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store, run_id="review", resume=True)
        pending = run(attach(made(), guard), kind)
        assert isinstance(pending, HumanFeedbackPending)
        assert result_of(guard).status is RunStatus.SUSPENDED
        assert [one.status for one in store.list_runs()] == ["SUSPENDED"]
        flow = made.from_pending(pending.context.flow_id, persistence)
        attach(flow, guard)
        if kind == "kickoff":
            answer = flow.resume("yes")
        else:
            answer = asyncio.run(flow.resume_async("yes"))
        assert answer == "sent after yes"
        assert [one.status for one in store.list_runs()] == ["RESUMED"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_persisted_flow_goes_on_as_without_the_guard(kind: str, tmp_path: Any) -> None:
    """@persist: the state is saved under the guard, and a kickoff with its id goes on from there."""

    class Numbered(BaseModel):
        id: str = "x1"
        n: int = 0

    seen = []
    for guard in (None, guard_of()):
        persistence = SQLiteFlowPersistence(str(tmp_path / f"{guard is None}.db"))

        @persist(persistence)
        class Counting(Flow[Numbered]):
            @start()
            def count(self) -> int:
                self.state.n += 1
                return self.state.n

        flows = [Counting() if guard is None else attach(Counting(), guard) for _ in range(2)]
        first = run(flows[0], kind)
        saved = persistence.load_state(flows[0].state.id)
        inputs = {"id": flows[0].state.id}
        second = flows[1].kickoff(inputs=inputs)
        seen.append((first, saved and saved["n"], second))
    assert seen[0] == seen[1] == (1, 1, 2)


SPLIT = NodeContract(node_id="splitter", input_schema=Text, output_schema=Words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["below", "above"])
def test_code_against_the_published_names_works(kind: str, where: str) -> None:
    """CrewAIAdapter(registry).wrap(flow) and the decorator, below @start or above it, on real flows."""
    words: list[Any] = [["a"], 7]

    def split(self: Any) -> Any:
        return {"words": words.pop(0)}

    step = stroma_crewai_step("splitter", SPLIT)
    decorated = start()(step(split)) if where == "below" else step(start()(split))
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
        adapter.wrap(forecast(Script.of()))
    with pytest.raises(TypeError, match="needs an instance of a Flow"):
        adapter.wrap(Flow)
    assert adapter.node_decorator("splitter", SPLIT)(lambda self: None)._stroma_node_id == "splitter"
