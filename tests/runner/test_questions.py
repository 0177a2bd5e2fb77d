"""Questions of nodes and flows have their own ids, are announced once, keep answers, in every store."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, create_model
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, runner_on
from tests.kit import Num, failing_with, node
from tests.shared_stores import STORES

from stroma import (
    ExecutionBudget,
    Flow,
    NodeHooks,
    NotDone,
    PipelineChanged,
    RunStatus,
    StoreError,
    Suspend,
    current_node,
    parallel,
    stroma_flow,
)
from stroma.runner.flows.suspension import FlowWaits
from stroma.trace import Question

store = store_fixture(*STORES)


class Approval(BaseModel):
    by: str


class Names(BaseModel):
    names: list[str]


class Heard:
    """Hooks that note each suspension, with its question."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Question | None]] = []
        self.hooks = NodeHooks(on_node_suspended=self._suspended)

    async def _suspended(self, run_id: str, node_id: str, reason: str) -> None:
        self.calls.append((node_id, reason, current_node().question))

    @property
    def questions(self) -> list[Question]:
        return [question for _, _, question in self.calls if question is not None]


@pytest.mark.parametrize("why", ["budget", "paused"])
async def test_the_open_questions_of_a_run_that_stops_for_another_reason(store: Any, why: str) -> None:
    """A flow that stops for its budget or a pause lists its open questions too, with their ids."""
    reached, opened = asyncio.Event(), asyncio.Event()
    budget = ExecutionBudget(max_tokens_total=1)
    runner = runner_on(store, on_budget="wait", budget=budget, inline_wait_seconds=0, resume=False)

    async def pay(state: Num) -> Num:
        reached.set()
        await opened.wait()
        current_node().report_usage(input_tokens=0 if why == "paused" else 9)
        return state

    paid = node("pay", pay)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await asyncio.gather(flow.wait_for(Approval, reason="hm?"), flow.step(paid, state))
        return state

    run = asyncio.ensure_future(runner.run(f, Num()))
    await asyncio.wait_for(reached.wait(), 20)
    if why == "paused":
        await runner.pause("r")
    opened.set()
    result = await run
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, [why, "hm?"])
    assert [one.reason for one in result.questions] == ["hm?"]
    outcome: Any = await runner.drive("r")
    assert outcome.questions == tuple(result.questions)


def asking(node_id: str, answer: type[BaseModel] = Approval, reason: str = "may I?") -> Any:
    async def ask(state: Num) -> Names:
        return Names(names=[getattr(current_node().wait_for(answer, reason=reason), "by", "")])

    return node(node_id, ask, Num, Names)


def asking_flow(
    *keys: str, answer: type[BaseModel] = Approval, text: str = "{}?", timeout: timedelta | None = None
) -> Any:
    """Return a flow that asks a question for each key at once, and returns the answers."""

    @stroma_flow("f", input=Num, output=Names)
    async def f(flow: Flow, state: Num) -> Names:
        waits = [
            flow.wait_for(answer, reason=text.format(key), key=key or None, timeout=timeout) for key in keys
        ]
        return Names(names=[str(getattr(one, "by", one)) for one in await asyncio.gather(*waits)])

    return f


async def test_each_question_of_a_flow_is_announced_once(store: Any) -> None:
    """Questions that a flow asks at once are each in the result, an event of the stream and one hook call."""
    heard = Heard()
    flow = asking_flow("a", "b", "c")
    stream = runner_on(store, hooks=heard.hooks).stream(flow, Num())
    events = [event async for event in stream if event.kind == "node_suspended"]
    result = stream.result
    assert (result.status, sorted(result.suspended)) == (RunStatus.SUSPENDED, ["a?", "b?", "c?"])
    assert {one.reason: one.kind for one in result.questions} == dict.fromkeys(["a?", "b?", "c?"], "approval")
    assert sorted(heard.questions, key=str) == sorted(result.questions, key=str)
    assert {event.details["question"]["id"] for event in events} == {one.id for one in result.questions}
    again = await runner_on(store, hooks=heard.hooks).run(flow, Num())
    assert set(again.questions) == set(result.questions)
    assert len(heard.calls) == 3


@pytest.mark.core
async def test_each_question_of_a_node_is_announced_once(store: Any) -> None:
    """A resume that finds the question of a node open calls neither the node nor its hooks; in groups too."""
    heard = Heard()
    nodes = [parallel(asking("x"), asking("y", reason="and I?"))]
    result = await runner_on(store, hooks=heard.hooks).run(nodes, Num())
    assert [(one.node_id, one.reason) for one in result.questions] == [("x", "may I?"), ("y", "and I?")]
    for _ in range(2):
        again = await runner_on(store, hooks=heard.hooks).run(nodes, Num())
        assert (again.status, again.questions) == (RunStatus.SUSPENDED, result.questions)
    assert sorted(heard.questions, key=str) == sorted(result.questions, key=str)
    assert {reason for _, reason, question in heard.calls if question is None} == {"may I?"}  # Of the group.


async def test_the_schema_of_an_answer_is_stored(store: Any) -> None:
    """A question has the JSON schema of its answer as data, in the result and in the store."""
    result = await runner_on(store).run(asking_flow("a", answer=Names), Num())
    assert result.questions[0].schema == Names.model_json_schema()
    assert store.waiting("r")[0].answer_schema() == Names.model_json_schema()
    free = await runner_on(store, run_id="s").run([node("ask", failing_with(Suspend, "what?"))], Num())
    assert free.questions[0].schema is None


@pytest.mark.core
@pytest.mark.parametrize("timeout", [None, timedelta(hours=1)])
@pytest.mark.parametrize("module", ["__main__", "app.flows"])
async def test_a_reworded_question_keeps_answers(store: Any, timeout: timedelta | None, module: str) -> None:
    """Neither the text of a question nor its class's module or name is its identity: answers stay valid."""
    first = await runner_on(store).run(asking_flow("", text="Send it?", timeout=timeout), Num())
    await runner_on(store).signal("r", Approval(by="Grace"))
    renamed = create_model("Consent", __module__=module, by=(str, ...))
    changed = asking_flow("", text="Send the letter?", timeout=timeout, answer=renamed)
    result = await runner_on(store).run(changed, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Names(names=["Grace"]))
    assert len(first.questions) == 1


async def test_a_reworded_open_question_is_the_same(store: Any) -> None:
    """An open question that is worded anew has the same id, is not announced again, and stored anew."""
    heard = Heard()
    first = await runner_on(store, hooks=heard.hooks).run(asking_flow("", text="Send it?"), Num())
    second = await runner_on(store, hooks=heard.hooks).run(asking_flow("", text="Really?"), Num())
    assert [one.id for one in second.questions] == [one.id for one in first.questions]
    assert [one.reason for one in store.waiting("r")] == ["Really?"]
    assert len(heard.calls) == 1
    await runner_on(store).signal("r", {"by": "Ada"}, question=first.questions[0].id)
    result = await runner_on(store).run(asking_flow("", text="Well?"), Num())
    assert result.final_state == Names(names=["Ada"])


@pytest.mark.core
async def test_a_later_question_at_the_same_place_is_another_one(store: Any) -> None:
    """An answer to an earlier question of a node before it asked again, went back or restarted is refused."""
    nodes = [node("first", failing_with(Suspend, "still?"))]
    ids = []

    async def ask(**config: Any) -> None:
        result = await runner_on(store, **config).run(nodes, Num())
        ids.append(result.questions[0].id)

    await ask()
    await runner_on(store).signal("r", True, question=ids[0])
    await ask()
    await ask(resume=False, resume_from="first")
    await ask(resume=False, if_exists="restart")
    assert len(set(ids)) == 4
    for stale in ids[:-1]:
        with pytest.raises(
            StoreError, match=f"{stale!r} of run 'r' is not open: {ids[-1]!r} was asked there"
        ):
            await runner_on(store).signal("r", True, question=stale)
    assert [one.payload for one in store.waiting("r")] == [None]


@pytest.mark.core
async def test_an_answer_that_no_longer_fits_stays(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that no longer accepts the stored answer is PipelineChanged until the class fits again."""
    stricter = create_model("Approval", by=(str, ...), reviewed=(bool, ...))
    for run_id, before, after in (
        ("node", [asking("ask")], [asking("ask", answer=stricter)]),
        ("flow", asking_flow(""), asking_flow("", answer=stricter)),
    ):
        runner = runner_on(store, run_id=run_id)
        await runner.run(before, Num())
        await runner.signal(run_id, Approval(by="Grace"))
        with monkeypatch.context() as patched:
            patched.setattr(f"{__name__}.Approval", stricter)
            with pytest.raises(
                PipelineChanged, match=r"answer to question '.*:1' of .* is not a Approval: reviewed"
            ):
                await runner.run(after, Num())
        assert store.get_run(run_id).status == "SUSPENDED"
        assert [one.payload for one in store.waiting(run_id)] == [b'{"by":"Grace"}']
        result = await runner.run(before, Num())
        assert result.final_state == Names(names=["Grace"])


@pytest.mark.core
@pytest.mark.parametrize("is_late", [False, True])
async def test_an_answer_is_accepted_until_a_process_records_the_timeout(
    store: Any, clock: Clock, is_late: bool
) -> None:
    """An answer is used, however late it comes or the run is resumed, if no process looked in between."""
    flow = asking_flow("", timeout=timedelta(days=7))
    await runner_on(store).run(flow, Num())
    clock.pass_by(days=8 * is_late)
    await runner_on(store).signal("r", Approval(by="Grace"))
    clock.pass_by(days=8)
    result = await runner_on(store).run(flow, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Names(names=["Grace"]))


@pytest.mark.core
async def test_an_answer_wins_over_its_timeout(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question whose time is over takes no answer; if one was accepted a moment before, that one counts."""
    withdraw = FlowWaits.withdraw

    async def answered_before(waits: FlowWaits, question: Any) -> None:
        await runner_on(store).signal("r", Approval(by="Grace"))
        await withdraw(waits, question)

    monkeypatch.setattr(FlowWaits, "withdraw", answered_before)
    result = await runner_on(store).run(asking_flow("", timeout=timedelta(seconds=0.05)), Num())
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Names(names=["Grace"]))


@pytest.mark.core
async def test_a_statement_is_about_one_call(store: Any) -> None:
    """G13. A statement that the last call did not happen is refused once the question is about the next."""
    requests, charged = [], []
    runner = runner_on(store, resume=False)

    @runner.node("charge", input=Num, output=Num, effect=True)
    async def charge(order: Num) -> Num:
        requests.append(1)
        if len(requests) == 1:
            raise ConnectionResetError
        charged.append(current_node().idempotency_key)
        if len(requests) == 2:
            raise TimeoutError
        return order

    first = await runner.run([charge], Num())
    (question,) = first.questions
    assert (question.kind, question.reason, question.node_id) == ("effect", "effect", "charge")
    for statement in (NotDone(), Num()):
        with pytest.raises(ValueError, match=r"pass question= with the id of one: '0:1' of 'charge'"):
            await runner.signal("r", statement)
    for _ in range(2):  # Two people look, and both state the same.
        await runner.signal("r", NotDone(), question=question.id)
    second = await runner.resume([charge], "r")
    assert second.questions[0].id != question.id
    with pytest.raises(StoreError, match="is not open"):
        await runner.signal("r", NotDone(), question=question.id)
    for result in [await runner.resume([charge], "r") for _ in range(2)]:
        assert result.questions == second.questions
    assert len(charged) == 1
