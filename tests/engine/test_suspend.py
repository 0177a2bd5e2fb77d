"""A node that waits for a person: the run stops, and goes on with the answer, days later and elsewhere."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, ValidationError
from tests.fixtures import store_fixture
from tests.kit import NEVER, THRICE, Num, Rot, SimpleStore, failing_with, node
from tests.kit import Many as Items
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    ExecutionBudget,
    FailureClass,
    Flow,
    InMemoryStore,
    RequestRefused,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.testing import RecordedRun

ITEMS = Items(items=[Num(n=1), Num(n=2), Num(n=3)])


class Approval(BaseModel):
    approved: bool
    by: str = "nobody"


store = store_fixture(*IN_PROCESS)


def runner(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store, run_id="r", policy_map=THRICE, **config)


class Desk:
    """Three nodes, the second of which asks; counts its calls and keeps its answers."""

    def __init__(self, schema: type[BaseModel] | None = Approval) -> None:
        self.calls: list[str] = []
        self.answers: list[Any] = []
        self.schema = schema
        self.nodes = [node("a", self.a), node("ask", self.ask), node("c", self.c)]

    async def a(self, state: Num) -> Any:
        self.calls.append("a")
        return {"n": state.n + 1}, 10

    async def ask(self, state: Num) -> Any:
        self.calls.append("ask")
        here = current_node()
        here.report_usage(input_tokens=1)
        if here.signal is None:
            raise Suspend("is this right?", schema=self.schema)
        self.answers.append(here.signal)
        return {"n": state.n + 10}

    async def c(self, state: Num) -> Any:
        self.calls.append("c")
        return {"n": state.n + 100}


@pytest.mark.core
async def test_a_run_waits_and_goes_on(store: Any) -> None:
    """A suspended run is SUSPENDED, not failed; after signal() a resume gives the node its typed answer."""
    desk = Desk()
    result = await runner(store).run(desk.nodes, Num())
    assert (result.status, result.failure, result.final_state) == (RunStatus.SUSPENDED, None, Num(n=1))
    assert result.suspended == ["is this right?"]
    assert [e.outcome for e in result.trace] == ["success", "suspended"]
    assert result.total_tokens == 11
    run = store.get_run("r")
    assert (run.status, run.error) == ("SUSPENDED", "waiting for an answer: is this right?")
    assert (run.tokens, run.holder) == (11, None)
    await runner(store).signal("r", {"approved": True, "by": "ada"})
    again = await runner(store).run(desk.nodes, Num(), resume=True)
    assert (again.status, again.final_state) == (RunStatus.RESUMED, Num(n=111))
    assert desk.answers == [Approval(approved=True, by="ada")]
    assert desk.calls == ["a", "ask", "ask", "c"]


async def test_without_an_answer_it_waits_again(store: Any) -> None:
    """A resume without an answer finds the same question open, and calls nothing."""
    desk = Desk()
    results = [await runner(store, resume=True).run(desk.nodes, Num()) for _ in range(3)]
    assert {result.status for result in results} == {RunStatus.SUSPENDED}
    assert len({result.questions for result in results}) == 1
    assert desk.calls == ["a", "ask"]
    assert len(store.waiting("r")) == 1


@pytest.mark.core
async def test_an_answer_is_validated(store: Any) -> None:
    """An answer that does not satisfy the schema is refused, and the run waits on."""
    desk = Desk()
    await runner(store).run(desk.nodes, Num())
    with pytest.raises(ValidationError):
        await runner(store).signal("r", {"approved": "perhaps"})
    with pytest.raises(ValidationError):
        await runner(store).signal("r", Num())
    assert store.waiting("r")[0].payload is None
    await runner(store).signal("r", Approval(approved=False))
    assert (await runner(store, resume=True).run(desk.nodes, Num())).status is RunStatus.RESUMED


async def test_any_json_will_do_where_no_schema_was_asked_for(store: Any) -> None:
    """Without a schema the answer is JSON data. With its keys in another order it is the same answer."""
    desk = Desk(schema=None)
    await runner(store).run(desk.nodes, Num())
    (question,) = store.waiting("r")
    for answer in ({"any": [1, 2.5, None, "é"], "b": 1}, {"b": 1, "any": [1, 2.5, None, "é"]}):
        await runner(store).signal("r", answer, question=question.id)
    await runner(store, resume=True).run(desk.nodes, Num())
    assert desk.answers == [{"any": [1, 2.5, None, "é"], "b": 1}]


async def test_nothing_waits(store: Any) -> None:
    """An answer to an unknown run, or to one without a question, is an error; the same one twice is not."""
    desk = Desk()
    await runner(store).run(desk.nodes, Num())
    with pytest.raises(CheckpointNotFound, match="there is no run 'unknown' in the store"):
        await runner(store).signal("unknown", {})
    await runner(store).signal("r", {"approved": True})
    with pytest.raises(RequestRefused, match="has no open question"):
        await runner(store).signal("r", {"approved": True})
    (question,) = store.waiting("r")
    await runner(store).signal("r", {"approved": True}, question=question.id)
    with pytest.raises(
        RequestRefused, match=f"'{question.id}' of run 'r' is not open: it has another answer"
    ):
        await runner(store).signal("r", {"approved": False}, question=question.id)
    for unknown in ("1:9", "7:1", "nonsense"):
        with pytest.raises(RequestRefused, match=f"run 'r' has no question '{unknown}'"):
            await runner(store).signal("r", {"approved": True}, question=unknown)


async def test_of_two_answers_one_counts(store: Any) -> None:
    """Of two people who answer at the same moment one is told that the other was faster; none is lost."""
    desk = Desk()
    await runner(store).run(desk.nodes, Num())
    answers = [runner(store).signal("r", Approval(approved=yes)) for yes in (True, False)]
    report = await asyncio.gather(*answers, return_exceptions=True)
    assert [type(error) for error in report if error is not None] == [RequestRefused]
    await runner(store, resume=True).run(desk.nodes, Num())
    assert [answer.approved for answer in desk.answers] == [report[0] is None]


async def test_a_sync_node_waits_too(store: Any) -> None:
    """A plain def may raise Suspend, and finds its answer."""

    def ask(state: Num) -> dict[str, Any]:
        return {"n": int(current_node().wait_for(Approval, reason="well?").approved)}

    nodes = [node("ask", ask)]
    result = await runner(store).run(nodes, Num())
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["well?"])
    await runner(store).signal("r", {"approved": True})
    assert (await runner(store, resume=True).run(nodes, Num())).final_state == Num(n=1)


async def test_an_answer_is_for_one_question(store: Any) -> None:
    """A node that asks a second question does not get the answer to its first one: it fails for good."""
    transfers: list[str] = []

    async def ask(state: Num) -> dict[str, Any]:
        here = current_node()
        if here.wait_for(Approval, reason="may the mail go out?").approved:
            transfers.append(here.wait_for(Approval, reason="may the money be sent?").by)
        return {"n": 1}

    nodes = [node("ask", ask)]
    await runner(store).run(nodes, Num())
    await runner(store).signal("r", {"approved": True, "by": "Ada"})
    failure = (await runner(store, resume=True).run(nodes, Num())).failure
    assert failure is not None
    assert failure.failure_class is FailureClass.TERMINAL
    assert "'ask' asks a second question" in str(failure.exception)
    assert transfers == []


@pytest.mark.core
async def test_children_of_a_group_wait(store: Any) -> None:
    """While a child waits its siblings finish; each child may be answered by its id, only it runs again."""
    calls: list[str] = []

    def child(node_id: str, asks: bool) -> Any:
        async def func(state: Num) -> Any:
            calls.append(node_id)
            await asyncio.sleep(0)
            here = current_node()
            if asks:
                return {f"is_{node_id}": here.wait_for(Approval, reason=f"may {node_id}?").by}
            return {f"is_{node_id}": "done"}

        class Out(BaseModel):
            pass

        Made = type("Made", (BaseModel,), {"__annotations__": {f"is_{node_id}": str}})
        return node(node_id, func, output=Made)

    nodes = [parallel(child("x", True), child("y", False), child("z", True), max_concurrency=1)]
    result = await runner(store).run(nodes, Num())
    assert (result.status, sorted(result.suspended)) == (RunStatus.SUSPENDED, ["may x?", "may z?"])
    assert calls == ["x", "y", "z"]
    (group,) = result.trace
    assert group.outcome == "suspended"
    outcomes = [(e.node_id, e.outcome) for e in group.children]
    assert outcomes == [("x", "suspended"), ("y", "success"), ("z", "suspended")]
    asked = [(one.kind, one.node_id, one.reason) for one in result.questions]
    assert asked == [("approval", "x", "may x?"), ("approval", "z", "may z?")]
    with pytest.raises(ValueError, match="2 open questions; pass question="):
        await runner(store).signal("r", {"approved": True})
    for one in result.questions:
        await runner(store).signal("r", {"approved": True, "by": f"by {one.node_id}"}, question=one.id)
    again = await runner(store, resume=True).run(nodes, Num())
    assert again.status is RunStatus.RESUMED, again.failure
    assert again.final_state.model_dump() == {"is_x": "by x", "is_y": "done", "is_z": "by z"}
    assert calls == ["x", "y", "z", "x", "z"]


async def test_items_wait(store: Any) -> None:
    """Items of map_over wait each on its own, each with a question of its own."""

    async def item(state: Num) -> Any:
        here = current_node()
        if state.n % 2:
            return {"n": 100 * state.n + int(here.wait_for(Approval, reason=f"{state.n}?").approved)}
        return {"n": state.n}

    nodes = [map_over("items", node("item", item), into="done")]
    result = await runner(store).run(nodes, ITEMS)
    assert result.status is RunStatus.SUSPENDED
    await runner(store).signal("r", {"approved": True}, question=result.questions[0].id)
    result = await runner(store, resume=True).run(nodes, ITEMS)
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["3?"])
    await runner(store).signal("r", {"approved": False})
    result = await runner(store, resume=True).run(nodes, ITEMS)
    assert [instance.n for instance in result.final_state.done] == [101, 2, 300]


async def test_a_failure_beats_a_question(store: Any) -> None:
    """A group in which one child waits and another stops for good fails."""

    async def broken(state: Num) -> Any:
        await asyncio.sleep(0.01)
        raise ValueError("broken")

    nodes = [parallel(node("ask", failing_with(Suspend, "well?")), node("broken", broken))]
    result = await StromaRunner.quick(store=store, policy_map=NEVER).run(nodes, Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.message == "broken"


@pytest.mark.core
async def test_a_crossed_limit_beats_a_question(store: Any) -> None:
    """A group in which one child waits and another takes the run over its budget stops as PARTIAL."""

    async def spend(state: Num) -> Any:
        await asyncio.sleep(0.01)
        return {"n": 1}, 11

    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=10))
    result = await runner.run(
        [parallel(node("ask", failing_with(Suspend, "well?")), node("spend", spend))], Num()
    )
    assert result.status is RunStatus.PARTIAL
    assert result.failure.reason == "budget"


@pytest.mark.core
async def test_an_answer_belongs_to_its_execution(store: Any) -> None:
    """A restart, and a resume from before the question, ask anew."""
    desk = Desk()
    await runner(store).run(desk.nodes, Num())
    await runner(store).signal("r", {"approved": True})
    assert (await runner(store).run(desk.nodes, Num(), if_exists="restart")).status is RunStatus.SUSPENDED
    await runner(store).signal("r", {"approved": True})
    assert (await runner(store).run(desk.nodes, Num(), resume_from="ask")).status is RunStatus.SUSPENDED


async def test_attaching_to_a_run_that_waits(store: Any) -> None:
    """Whoever attaches to a run that is suspended meanwhile is told what it waits for; that is no failure."""
    inside, gate = asyncio.Event(), asyncio.Event()

    async def ask(state: Num) -> Any:
        inside.set()
        await gate.wait()
        raise Suspend("may I?")

    nodes = [node("ask", ask)]
    held = asyncio.create_task(runner(store).run(nodes, Num()))
    await inside.wait()
    attached = asyncio.create_task(runner(store, if_running="attach").run(nodes, Num()))
    await asyncio.sleep(0.05)
    gate.set()
    for result in (await held, await attached):
        assert (result.status, result.failure, result.suspended) == (RunStatus.SUSPENDED, None, ["may I?"])


async def test_answered_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G11: The class of an answer is looked up and never imported."""
    desk = Desk()
    async with SQLiteStore(tmp_path / "runs.db") as first:
        await runner(first).run(desk.nodes, Num())
    async with SQLiteStore(tmp_path / "runs.db") as second:
        (waiting,) = second.waiting("r")
        assert (waiting.node_id, waiting.reason) == ("ask", "is this right?")
        assert waiting.schema_ref == f"{__name__}:Approval"
        lost = waiting._replace(schema_ref="antigravity:Approval")
        monkeypatch.setattr(second, "waiting", lambda run_id: [lost])
        with pytest.raises(RequestRefused, match="is not imported"):
            await runner(second).signal("r", {"approved": True})
        await runner(second).signal("r", {"approved": True}, schema=Approval)
        result = await runner(second, resume=True).run(desk.nodes, Num())
    assert result.status is RunStatus.RESUMED
    assert desk.answers == [Approval(approved=True)]


async def test_a_store_without_a_journal_cannot_wait() -> None:
    """A store of the simple protocol cannot keep what a node waits for: the run stops as PARTIAL, by name."""
    result = await StromaRunner.quick(store=SimpleStore()).run(Desk().nodes, Num())
    assert result.status is RunStatus.PARTIAL
    assert "has no journal" in result.failure.message


@pytest.mark.core
async def test_what_a_suspension_may_ask_for() -> None:
    """Only pydantic models can be asked for, says the error; a subclass of Suspend may leave it out."""

    class Quiet(Suspend):
        def __init__(self) -> None:
            pass

    async def wrong(state: Num) -> Any:
        raise Suspend("which?", schema=int)

    result = await runner(AsyncInMemoryStore()).run([node("wrong", wrong)], Num())
    assert "must be a pydantic model" in result.failure.message
    result = await runner(AsyncInMemoryStore()).run([node("quiet", failing_with(Quiet))], Num())
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["Quiet"])


class Login(BaseModel):
    password: SecretStr


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("asked_by", ["node", "flow", "message", "effect"])
async def test_secrets_in_answers_and_messages(tmp_path: Path, asked_by: str, in_memory: bool) -> None:
    """Memory, or a store with a codec, takes secrets in answers and messages; no failure shows them."""
    password = "hunter2hunter2"
    login = Login(password=SecretStr(password))

    async def log_in(state: Any) -> Any:
        given = current_node().wait_for(Login, reason="password?") if asked_by == "node" else state
        raise PermissionError(f"wrong: {given.password.get_secret_value()}")

    @stroma_node(effect=True)
    async def register(state: Num) -> Login:
        raise TimeoutError("no answer")

    @stroma_flow("logins")
    async def logins(flow: Flow, state: Num) -> Num:
        if asked_by == "flow":
            given = await flow.wait_for(Login, reason="password?")
        elif asked_by == "message":
            given = await flow.receive(Login)
        else:
            given = await flow.step(register, state)
        raise PermissionError(f"wrong: {given.password.get_secret_value()}")

    work: Any = [node("log_in", log_in)] if asked_by == "node" else logins
    durable: Any = SQLiteStore(tmp_path / "runs.db", codec=Rot())
    async with contextlib.nullcontext(InMemoryStore()) if in_memory else durable as store:
        asking = StromaRunner.quick(store=store, policy_map=NEVER)
        waiting = await asking.run(work, Num(), run_id="r")
        assert waiting.status is RunStatus.SUSPENDED
        if asked_by == "message":
            await asking.send("r", login)
        else:
            await asking.signal("r", login, question=waiting.questions[0].id)
        result = await asking.resume(work, "r")
        assert str(result.failure) == "PermissionError: wrong: **********"
        record = store.get_run("r")
        assert password not in record.error
        assert password not in str(RecordedRun.read(store, "r").to_json())
