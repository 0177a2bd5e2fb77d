"""replay(): what the code of today makes of a recorded run, without a call."""

import asyncio
import json

import pytest
from pydantic import BaseModel, Field, field_validator
from tests.fixtures import store_fixture
from tests.kit import Item, failing_with, noting
from tests.testing.pipelines import Number, add_one, double, make, patient

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    StromaRunner,
    Suspend,
    map_over,
    parallel,
    stroma_node,
)
from stroma.testing import FakeClock, FaultPlan, RecordedRun, crash_at, pipeline_in, replay, replay_sync


class Order(BaseModel):
    n: int = 0
    items: list[Item] = []


class Renamed(BaseModel):
    n: int = 0
    items: list[Item] = []
    note: str = ""


class Small(BaseModel):
    n: int = Field(default=0, lt=1)
    items: list[Item] = []


class Shifted(Order):
    @field_validator("n")
    @classmethod
    def shift(cls, value: int) -> int:
        return value + 77


class Calls:
    """Nodes that note that they are called."""

    def __init__(self):
        self.calls = []

    def node(self, node_id, func, input_model=Order, output_model=Order):
        async def step(state):
            self.calls.append(node_id)
            return await func(state)

        return make(node_id, step, input_model, output_model)


async def paid(state):
    return {"n": state.n + 1, "items": state.items}, 10, 5, "gpt-4o-mini"


async def grow(state):
    return {"n": state.n + 1, "items": state.items}


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def nodes(calls):
    return [
        calls.node("read", paid),
        calls.node("check", grow),
        parallel(calls.node("left", grow), calls.node("right", paid)),
        map_over("items", calls.node("item", double, Item, Item), into="out"),
    ]


ORDER = Order(items=[Item(n=1), Item(n=2)])


store = store_fixture("async-memory", "sqlite")


async def record(store, nodes, state=ORDER, *, faults=None, **config):
    """Run and record; the calls are forgotten."""
    with FakeClock(), faults or FaultPlan():
        await patient(store=store, **config).run(nodes, state, run_id="r")
    return RecordedRun.read(store, "r")


async def differences(recorded, nodes, runner=None):
    result = await replay(recorded, nodes, runner=runner or patient())
    return result, [(difference.kind, difference.node_id) for difference in result.differences]


@pytest.mark.core
async def test_unchanged_code_goes_the_same_way_without_a_call(store, nodes, calls):
    """Contracts, retries, groups, maps and totals come out as they were, and no node is called."""
    plan = FaultPlan().fail("check", TimeoutError("x")).fail("item", attempt=1)
    recorded = await record(store, nodes, faults=plan)
    calls.calls.clear()
    result, text = await differences(recorded, nodes)
    result.assert_same()
    assert (text, calls.calls, result.stopped) == ([], [], None)
    assert result.status is RunStatus.COMPLETED
    assert (result.result.total_tokens, result.result.total_cost_usd) == (30, pytest.approx(9e-06))
    assert [len(result.result.trace.events_for(name)) for name in ("read", "check")] == [1, 2]


async def test_a_file_holds_all_of_it(store, nodes, tmp_path):
    """What is saved is loaded, and replays the same."""
    recorded = await record(store, nodes, faults=FaultPlan().fail("check"))
    recorded.save(tmp_path / "r.json")
    assert RecordedRun.load(tmp_path / "r.json") == recorded
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "stroma.recorded-run/1"
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match=r"r.json: .*record it again"):
        RecordedRun.load(tmp_path / "r.json")


async def test_a_contract_that_fails_now(store, nodes, calls):
    """An output that its contract no longer takes is found at its node, also if the node is tried again."""
    recorded = await record(store, nodes)
    result, text = await differences(recorded, [calls.node("read", paid, output_model=Small), *nodes[1:]])
    assert text == [("schema", "read"), ("contract", "read"), ("status", "")]
    assert "n: Input should be less than 1" in str(result.differences[1])
    assert result.status is RunStatus.FAILED
    with pytest.raises(AssertionError, match="behaves differently now:\n  schema: 0 read"):
        result.assert_same()
    small, repairing = calls.node("read", paid, output_model=Small), patient(contract_retries={"read": 1})
    result, text = await differences(recorded, [small, *nodes[1:]], repairing)
    assert text == [("schema", "read"), ("contract", "read"), ("decision", "read")]
    assert "n: Input should be less than 1" in str(result.differences[1])
    assert str(result.differences[2]) == "decision: 0 read: it is tried again, where the run made 1 attempt"


async def test_an_input_contract_that_fails_now(store, nodes, calls):
    """So is an input; and the input of the run itself."""
    recorded = await record(store, nodes)
    _, text = await differences(
        recorded, [nodes[0], calls.node("check", grow, input_model=Small), *nodes[2:]]
    )
    assert text == [("contract", "check"), ("status", "")]

    class Needs(BaseModel):
        missing: int

    result, text = await differences(recorded, [calls.node("read", paid, input_model=Needs), *nodes[1:]])
    assert text == [("input", ""), ("contract", "read"), ("status", "")]
    assert "missing" in result.differences[0].message


async def test_a_schema_that_has_changed(store, nodes, calls):
    """An output that only its upcast changed is listed, and the code counts as behaving as it did.

    Without an upcast, a schema that has changed is a difference, though the recorded output fits.
    """
    recorded = await record(store, nodes)
    _, text = await differences(recorded, [calls.node("read", paid, output_model=Renamed), *nodes[1:]])
    assert text == [("schema", "read"), ("output", "read")]

    contract = NodeContract(
        node_id="read", input_schema=Order, output_schema=Renamed, upcast=lambda raw: {**raw, "note": "new"}
    )
    uncalled = stroma_node("read", contract)(failing_with(AssertionError, "it is not called"))
    result, text = await differences(recorded, [uncalled, *nodes[1:]])
    assert text == [("upcast", "read")]
    assert 'output.note is new: "new"' in result.differences[0].message
    result.assert_same()
    left = NodeContract(
        node_id="left", input_schema=Order, output_schema=Renamed, upcast=lambda raw: {**raw, "note": "new"}
    )
    group = parallel(
        stroma_node("left", left)(failing_with(AssertionError, "it is not called")), calls.node("right", paid)
    )
    result, text = await differences(recorded, [*nodes[:2], group, nodes[3]])
    later = ("upcast", "map_over(items, item)")
    assert text == [("upcast", "parallel(left, right)"), ("upcast", "left"), later]
    result.assert_same()


async def test_nodes_that_are_gone_or_new(store, nodes, calls):
    """A node that is gone is told and the rest is followed; a new one has nothing to hand on."""
    recorded = await record(store, nodes)
    result, text = await differences(recorded, nodes[1:])
    assert (text, result.stopped) == ([("missing", "read")], None)
    result, text = await differences(recorded, [nodes[0], calls.node("new", grow), *nodes[1:]])
    assert text == [("new", "new")]
    assert result.stopped.startswith("at 1 new: the run had no such node")
    _, text = await differences(recorded, [calls.node("renamed", paid), *nodes[1:]])
    assert text == [("missing", "read"), ("new", "renamed")]


@pytest.mark.core
async def test_nodes_in_another_order(store, nodes, calls):
    """Nodes that have changed places are told even with equal outputs; where one is gone the rest has not."""
    read, check, *_ = nodes
    recorded = await record(store, [read, check])
    result = await replay(recorded, [check, read])
    assert list(map(str, result.differences)) == [
        "decision: 1 read: it comes after 'check' now, and came before it"
    ]
    assert calls.calls == ["read", "check"]
    assert [one.kind for one in (await replay(recorded, [check])).differences] == ["missing"]


@pytest.mark.core
async def test_another_decision_to_retry(store, nodes):
    """Fewer retries than the run needed stop it; more than it had lead to where nothing is recorded."""
    recorded = await record(store, nodes, faults=FaultPlan().fail("check", attempt=(1, 2)))
    result, text = await differences(recorded, nodes, patient(retries=1))
    assert text == [("decision", "check"), ("status", "")]
    assert "attempts: 3 -> 2" in str(result.differences[0])
    assert result.status is RunStatus.PARTIAL

    gave_up = await record(store, nodes, faults=FaultPlan().fail("check", ZeroDivisionError, attempt=None))
    assert gave_up.status == "PARTIAL"
    assert (await differences(gave_up, nodes))[1] == []
    result, text = await differences(gave_up, nodes, patient(retries=3))
    assert text == [("decision", "check")]
    assert "it is tried again, where the run made 3 attempts" in result.differences[0].message


async def test_another_class_of_a_failure(store, nodes):
    """A classifier of today is asked about a failure with the message of then."""
    recorded = await record(store, nodes, faults=FaultPlan().fail("check", ValueError("quota"), attempt=1))
    assert (await differences(recorded, nodes))[1] == []

    def terminal(error, context):
        return FailureClass.TERMINAL if "quota" in str(error) else None

    result, text = await differences(recorded, nodes, patient(classifiers=[terminal]))
    assert text == [("decision", "check"), ("status", "")]
    assert result.status is RunStatus.FAILED


@pytest.mark.core
async def test_a_wait_that_no_journal_keeps_is_no_difference(store, nodes):
    """A run that a server stopped with too long a wait stops there, under any policy."""

    class Response:
        status_code = 429
        headers = {"retry-after": "100000"}  # noqa: RUF012

    class TooMany(Exception):
        response = Response()

    recorded = await record(store, nodes, faults=FaultPlan().fail("check", TooMany("later")))
    assert (recorded.status, recorded.attempts[-1].reason) == ("PARTIAL", "rate_limit")
    result, text = await differences(recorded, nodes)
    assert (text, result.status) == ([], RunStatus.PARTIAL)


@pytest.mark.core
async def test_another_budget(store, nodes):
    """The arithmetic of today is done with the usage of then: a smaller limit stops the run there."""
    recorded = await record(store, nodes)
    small = ExecutionBudget(max_tokens_total=20, max_cost_usd=None, max_latency_ms=None)
    result, text = await differences(recorded, nodes, patient(budget=small))
    assert ("decision", "right") in text
    assert text[-1] == ("status", "")
    assert (result.status, result.result.total_tokens) == (RunStatus.PARTIAL, 30)

    stopped = await record(store, nodes, budget=small)
    assert (await differences(stopped, nodes, patient(budget=small)))[1] == []
    result, text = await differences(stopped, nodes)
    assert ("decision", "right") in text
    assert result.stopped is not None


async def test_what_a_group_makes_of_the_same_outputs(store, nodes, calls):
    """A group is put together by the code of today: another order of its children gives another state."""
    other = parallel(nodes[2].children[1], nodes[2].children[0])
    recorded = await record(store, [nodes[0], parallel(make("l", add_one, Order), make("r", double, Order))])
    _, text = await differences(
        recorded, [nodes[0], parallel(make("r", double, Order), make("l", add_one, Order))]
    )
    assert ("missing", "parallel(l, r)") in text
    assert other.node_id == "parallel(right, left)"


async def test_collected_failures_are_the_same(store):
    """The failures of items that a map collected have the recorded text, whatever their exception was."""
    errors = {
        1: TimeoutError("late"),
        2: KeyError("key"),
        3: ConnectionRefusedError("no"),
        4: TypeError("odd"),
    }

    async def item(state):
        if state.n in errors:
            raise errors[state.n]
        return {"n": "many" if state.n == 5 else state.n}

    collecting = map_over("items", make("item", item, Item, Item), into="items", on_item_failure="collect")
    start = Order(items=[Item(n=n) for n in range(7)])
    recorded = await record(store, [collecting], start)
    assert recorded.status == "COMPLETED"
    assert (await differences(recorded, [collecting]))[1] == []


@pytest.mark.core
async def test_runs_that_failed_are_followed(store, calls):
    """A broken contract, a repaired one, a failed child beside a cancelled one: each repeats."""
    import asyncio

    async def wrong(state):
        return {"n": "many"}

    async def hang(state):
        await asyncio.sleep(1e6)

    async def broken(state):
        raise PermissionError("no")

    for nodes, config in [
        ([calls.node("wrong", wrong)], {}),
        ([calls.node("read", paid), calls.node("wrong", wrong)], {"contract_retries": {"wrong": 2}}),
        ([calls.node("wrong (input)", wrong)], {}),
        ([parallel(calls.node("broken", broken), calls.node("hang", hang)), calls.node("read", paid)], {}),
        ([calls.node("hang", hang)], {"node_timeouts": {"hang": 50}}),
    ]:
        recorded = await record(store, nodes, **config)
        assert recorded.status in ("FAILED", "PARTIAL")
        result, text = await differences(recorded, nodes, patient(**config))
        assert text == [], result.differences
        assert result.status == recorded.status


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("ticks", range(0, 24, 4))
async def test_siblings_that_end_together(store, calls, ticks, retries):
    """Siblings of a group that end at the same instant end in a replay as they are recorded."""
    import asyncio

    async def late(state):
        for _ in range(ticks):
            await asyncio.sleep(0)
        raise PermissionError("no")

    beside = parallel(
        calls.node("left", grow), map_over("items", calls.node("item", double, Item, Item), into="out")
    )
    work = parallel(parallel(calls.node("late", late)), beside, calls.node("later", late))
    with FakeClock():
        await patient(retries=retries, store=store).run([work], ORDER, run_id="r")
    recorded = RecordedRun.read(store, "r")
    assert recorded.status == "PARTIAL"
    assert (await differences(recorded, [work], patient(retries=retries)))[1] == []


async def test_a_run_that_waits_for_a_person(store, calls):
    """A suspended run is one again."""

    async def ask(state):
        raise Suspend("yes or no?")

    recorded = await record(store, [calls.node("read", paid), calls.node("ask", ask)])
    result, text = await differences(recorded, [calls.node("read", paid), calls.node("ask", ask)])
    assert (text, result.status) == ([], RunStatus.SUSPENDED)


async def test_a_run_that_never_ended_is_followed_as_far_as_it_came(store, nodes):
    """A run whose process died is no different, up to where it is recorded."""
    with crash_at("after_node", "check"):
        await patient(store=store).run(nodes, ORDER, run_id="r")
    result, text = await differences(RecordedRun.read(store, "r"), nodes)
    assert text == []
    assert result.stopped == "at 1 check: the run came no further"


@pytest.mark.core
@pytest.mark.parametrize("how", ["cancelled", "interrupted"])
@pytest.mark.parametrize("in_group", [False, True])
async def test_a_run_that_was_cut_off_is_followed_as_far_as_it_came(in_group, how):
    """A run that was cancelled, or that a process left, is no different up to the calls in progress."""
    store, begun = AsyncInMemoryStore(), asyncio.Event()

    async def wait(state):
        begun.set()
        await asyncio.Event().wait()

    waits = make("wait", wait)
    nodes = [make("add", add_one), parallel(make("double", double), waits) if in_group else waits]
    runner = patient(store=store)
    task = asyncio.create_task(runner.run(nodes, Number(), run_id="r"))
    await begun.wait()
    if how == "cancelled":
        task.cancel()
    else:
        await runner.shutdown(drain_seconds=0)
    await asyncio.wait([task])
    result, text = await differences(RecordedRun.read(store, "r"), nodes)
    assert (text, result.stopped) == ([], f"at {'1.1' if in_group else '1'} wait: the run came no further")


@pytest.mark.core
async def test_a_run_that_several_processes_made(store, nodes):
    """Attempts of processes that came before at the same place are not handed on: the last one's are."""
    runner = patient(0, retries=0, store=store)
    with FaultPlan().fail("check", ZeroDivisionError):
        await runner.run(nodes, ORDER, run_id="r")
    await runner.run(nodes, ORDER, run_id="r", resume=True)
    recorded = RecordedRun.read(store, "r")
    assert recorded.status == "RESUMED"
    assert (await differences(recorded, nodes, patient(retries=0)))[1] == []


@pytest.mark.core
async def test_redaction(store, nodes, calls, tmp_path):
    """What redact hides is in no file and in no difference; that something differs there is told."""

    def redact(state):
        return {**state, "n": 0} if "n" in state else state

    recorded = await record(store, nodes)
    assert recorded.redacted(redact).to_json()["attempts"][0]["output"]["n"] == 0
    changed = [calls.node("read", paid, output_model=Shifted), *nodes[1:]]
    result, _ = await differences(recorded, changed, patient(redact=redact))
    assert "78" not in str(result.differences)
    assert "it differs in what is redacted" in str(result.differences)
    broken, _ = await differences(
        recorded, [calls.node("read", paid, output_model=Small), *nodes[1:]], patient(redact=redact)
    )
    assert "less than" not in str(broken.differences)


@pytest.mark.core
async def test_redaction_of_messages(store):
    """What redact takes out of states is in no message of a recording, nor in a replay's error."""

    class Letter(BaseModel):
        name: str = "Augusta Ada King"

    def redact(state):
        return {**state, "name": "***"} if "name" in state else state

    async def keep(state):
        return state

    async def refuse(state):
        raise ValueError(f"cannot write to {state.name[:14]}..., {state.name!r}")

    first, last = make("first", keep, Letter, Letter), make("last", refuse, Letter, Letter)
    recorded = await record(store, [first, last], Letter(), redact=redact)
    assert "Ada" in json.dumps(recorded.to_json())
    text = json.dumps(recorded.redacted(redact).to_json())
    assert "Ada" not in text
    assert (
        text.count("cannot write to [redacted]..., '[redacted]'") == 4
    )  # Three attempts, and why it stopped.
    read = RecordedRun.read(store, "r", redact=redact)
    (await replay(read, [first, last], runner=patient(redact=redact))).assert_same()
    other = make("third", keep, Letter, Letter)
    result = await replay(recorded, [first, other, last], runner=patient(redact=redact))
    assert "Ada" not in str(result.differences) + str(result.stopped)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position", "x"),
        ("node_id", []),
        ("tokens", None),
        ("attempt", {}),
        ("failure_class", "WORSE"),
        ("cost_usd", "1"),
    ],
)
async def test_a_damaged_file_is_named(store, nodes, tmp_path, name, value):
    """A recording with a value of another type is refused when it is read, with the field."""
    data = (await record(store, nodes)).to_json()
    data["attempts"][0][name] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=rf"run\.json: recorded run is damaged: attempts\.0\.{name}: .*; record it again"
    ):
        RecordedRun.load(path)


async def test_the_config_of_the_pipeline_counts(store, nodes):
    """A Pipeline brings its own config; no hook of it is told, and nothing is kept."""
    events = []

    hook = noting(events, lambda *arguments: arguments)
    policy = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=0, backoff_seconds=0)}
    hooks = NodeHooks(on_node_success=hook, on_run_end=hook)
    config = RunConfig(policy_map=policy, hooks=hooks, run_id="own")
    recorded = await record(store, nodes, faults=FaultPlan().fail("check"))
    before = len(store.list_runs())
    result = await replay(recorded, Pipeline("orders", nodes, config=config))
    assert [difference.kind for difference in result.differences] == ["decision", "status"]
    assert events == []
    assert len(store.list_runs()) == before


def test_replay_without_an_event_loop(nodes):
    """replay_sync does the same; a run that is not there is an error."""
    store = AsyncInMemoryStore()
    StromaRunner.quick(store=store).run_sync(nodes, ORDER, run_id="r")
    replay_sync(RecordedRun.read(store, "r"), nodes).assert_same()
    with pytest.raises(LookupError, match="there is no run 'x'"):
        RecordedRun.read(store, "x")


def test_a_pipeline_in_a_file_has_the_settings_of_the_runner_beside_it(tmp_path):
    """A replay in a test decides as `stroma run FILE:NAME` did: by the file's only runner with settings."""
    text = """if True:
        from pydantic import BaseModel
        from stroma import *

        class Number(BaseModel):
            n: int = 0

        runner = StromaRunner.quick(tags=("one",))

        @runner.node("same", input=Number, output=Number)
        async def same(number):
            return number

        pipeline = Pipeline("same", [same])
    """
    (tmp_path / "one_runner.py").write_text(text)
    config = pipeline_in(tmp_path / "one_runner.py").config
    assert config.tags == ("one",)
    (tmp_path / "two_runners.py").write_text(text + '    other = StromaRunner.quick(tags=("two",))\n')
    with pytest.raises(LookupError, match="2 runners beside it have settings: runner, other"):
        pipeline_in(tmp_path / "two_runners.py")


async def test_states_that_plain_json_does_not_hold(store):
    """NaN, bytes and decimals come back as they were."""
    from decimal import Decimal

    class Odd(BaseModel):
        value: float = 0.0
        data: bytes = b""
        price: Decimal = Decimal(0)
        n: int = 0

    async def odd(state):
        return {"value": float("nan"), "data": b"\x00\xff", "price": Decimal("1.10")}

    nodes = [make("odd", odd, Number, Odd), make("next", add_one, Odd, Number)]
    recorded = await record(store, nodes, Number())
    again = RecordedRun.from_json(json.loads(json.dumps(recorded.to_json())))
    assert again == recorded
    assert (await differences(again, nodes))[1] == []
