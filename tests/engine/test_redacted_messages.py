"""Messages of a run with a ``redact``: they are redacted once, and nothing shows them in another form."""

import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from tests.kit import NEVER, context_of, noting, quick

from stroma import (
    Flow,
    Journal,
    JsonLines,
    NodeHooks,
    NotDone,
    RunStatus,
    SQLiteStore,
    StepFailed,
    StromaRunner,
    Suspend,
    current_run,
    execute_step,
    map_over,
    parallel,
)
from stroma.adapters import Guard
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.history.reader import History
from stroma.testing import RecordedRun
from stroma.trace.redaction import forms_to_hide, hide_words, removed_values

SSN = "078-05-1120"


class Person(BaseModel):
    ssn: str = ""
    n: int = 0


class Done(BaseModel):
    ok: bool = True


def hide(state: dict[str, Any]) -> dict[str, Any]:
    """Change the dict that it gets, as a redact may."""
    if "ssn" in state:
        state["ssn"] = "***"
    return state


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with SQLiteStore(tmp_path / "runs.db") as store:
        yield store


@pytest.fixture
def runner(store: SQLiteStore) -> StromaRunner[Any]:
    return quick(store=store, redact=hide, policy_map=NEVER, events="store", inline_wait_seconds=0)


def recorded(store: SQLiteStore, run_id: str) -> str:
    """Return all that a store lists of a run, without states."""
    events = b"".join(lines for _, lines in store.read_events(run_id, EventPlace(0, 0), 100).batches).decode()
    attempts = [(one.message, one.reason) for one in store.attempts(run_id)]
    outcome = [one for one in events.splitlines() if '"failure"' in one or '"reason"' in one]
    return str((store.get_run(run_id), attempts, store.waiting(run_id), store.flow_notes(run_id), outcome))


def targets(runner: StromaRunner[Any], folder: Path) -> dict[str, Callable[[str], Any]]:
    """Return runs in each of which a message quotes a value."""

    @runner.node
    async def lookup(state: Done) -> Person:
        return Person(ssn=SSN)

    @runner.node
    async def use(state: Person) -> Done:
        raise ValueError(f"bad ssn {state.ssn}")

    @runner.node
    async def misreports(state: Person) -> tuple[Done, Any]:
        return Done(), f"bad ssn {state.ssn}"

    @runner.node
    async def calls(state: Done) -> Done:
        found = await execute_step("use", use, Person(ssn=SSN), current_run())
        raise found.failure.exception

    @runner.node
    async def closes(state: Person) -> Done:
        async def inside(_: Done) -> Done:
            raise ValueError(f"bad ssn {state.ssn}")

        found = await execute_step("inside", inside, Done(), current_run())
        raise RuntimeError(str(found.failure.exception)) from found.failure.exception

    @runner.flow
    async def flow(flow: Flow, state: Done) -> Done:
        return await flow.step(use, await flow.step(lookup, state))

    @runner.flow
    async def own(flow: Flow, state: Done) -> Done:
        found = await flow.step(lookup, state)
        raise ValueError(f"bad ssn {found.ssn}")

    @runner.flow
    async def wraps(flow: Flow, state: Done) -> Done:
        try:
            return await flow.run(flow_of_person, Person(ssn=SSN))
        except StepFailed as error:
            raise RuntimeError(f"{error}, of {error.__cause__}") from error

    @runner.flow
    async def flow_of_person(flow: Flow, state: Person) -> Done:
        raise ValueError(f"bad ssn {state.ssn}")

    lines = folder / "people.jsonl"
    lines.write_text(json.dumps({"ssn": SSN}) + "\n")

    def guarded(run_id: str) -> None:
        guard = Guard(runner)

        @guard.step("second")
        def second(ssn: str) -> None:
            raise ValueError(f"bad ssn {ssn}")

        with pytest.raises(ValueError, match=SSN), guard.run(run_id=run_id):
            second(SSN)

    def run(target: Any) -> Callable[[str], Any]:
        return lambda run_id: runner.run_sync(target, Done(), run_id=run_id)

    return {
        "a node": run([lookup, use]),
        "a usage": run([lookup, misreports]),
        "a group": run([lookup, parallel(use)]),
        "a step of a node": run([calls]),
        "a function inside a node": run([lookup, closes]),
        "a step of a flow": run(flow),
        "the body of a flow": run(own),
        "a flow in a flow": run(wraps),
        "an item of a file": run([map_over(JsonLines(lines), use, into=Journal())]),
        "a skipped item": run([map_over(JsonLines(lines), use, into=Journal(), on_item_failure="collect")]),
        "a guarded step": guarded,
    }


@pytest.mark.core
@pytest.mark.parametrize(
    "where",
    [
        "a node",
        "a usage",
        "a group",
        "a step of a node",
        "a function inside a node",
        "a step of a flow",
        "the body of a flow",
        "a flow in a flow",
        "an item of a file",
        "a skipped item",
        "a guarded step",
    ],
)
def test_no_record_quotes_what_redact_removes(
    where: str,
    runner: StromaRunner[Any],
    store: SQLiteStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A message in journal, stored events, trace, log and result lacks the values that redact removes from
    states; the exception of the caller is the original one."""
    caplog.set_level(logging.DEBUG, "stroma")
    result = targets(runner, tmp_path)[where]("r")
    assert SSN not in recorded(store, "r") + caplog.text
    assert "bad ssn [redacted]" in recorded(store, "r")
    assert "bad ssn [redacted]" in caplog.text
    if result is not None and result.failure is not None:
        assert SSN in str(result.failure.exception)
        assert SSN not in result.failure.message
        assert not [event for event in result.trace.walk() if SSN in str(event.failure_message)]


@pytest.mark.core
async def test_a_resumed_flow_hides_what_it_was_given_before(
    runner: StromaRunner[Any], store: SQLiteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a flow's body lacks the restored outputs, answers and messages that redact hides."""

    @runner.node
    async def lookup(state: Done) -> Person:
        return Person(ssn=SSN)

    @runner.flow
    async def asks(flow: Flow, state: Done) -> Done:
        found = await flow.step(lookup, state)
        answer = await flow.wait_for(Person, reason=f"is {found.ssn} known?")
        message = await flow.receive(Person)
        raise ValueError(f"{found.ssn}, {answer.ssn} and {message.ssn} differ")

    result = await runner.run(asks, Done(), run_id="r")
    assert result.suspended == ["is [redacted] known?"]
    await runner.signal("r", {"ssn": "answered ssn"})
    await runner.send("r", {"ssn": "received ssn"})
    result = await runner.resume(asks, "r")
    assert result.failure.message == "[redacted], [redacted] and [redacted] differ"
    assert str(result.failure.exception) == f"{SSN}, answered ssn and received ssn differ"
    assert result.failure.message in str(store.get_run("r"))
    assert SSN not in caplog.text


async def test_a_flow_with_a_state_that_cannot_be_shown_has_no_message() -> None:
    """Where a state of a flow's body cannot be taken apart, the flow runs on, and its messages are hidden."""

    class Odd(dict[str, Any]):
        def items(self) -> Any:
            raise RuntimeError("not now")

    class Holder(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        odd: Any = None

    memory = quick(redact=hide, policy_map=NEVER)

    @memory.node
    async def find(state: Done) -> Holder:
        return Holder(odd=Odd(a=1))

    @memory.flow
    async def fails(flow: Flow, state: Done) -> Done:
        await flow.step(find, state)
        raise ValueError(f"bad ssn {SSN}")

    result = await memory.run(fails, Done())
    assert str(result.failure.exception) == f"bad ssn {SSN}"
    assert result.failure.message == "[redacted]"


@pytest.mark.core
async def test_the_outcome_of_an_effect_is_redacted(
    runner: StromaRunner[Any], store: SQLiteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the line about an unknown outcome, its question nor reconcile quotes a hidden value. An outcome
    that reconcile settles has no such line."""
    caplog.set_level(logging.DEBUG, "stroma")

    async def look(state: Person, *_: Any) -> Any:
        return NotDone(f"there is no {state.ssn}")

    @runner.node(effect=True)
    async def charge(state: Person) -> Done:
        raise TimeoutError(f"no answer for {state.ssn}")

    @runner.node(effect=True, reconcile=look)
    async def reconciled(state: Person) -> Done:
        raise TimeoutError(f"no answer for {state.ssn}")

    assert (await runner.run([charge], Person(ssn=SSN), run_id="r")).status is RunStatus.SUSPENDED
    unknown = "has an unknown outcome: TimeoutError: no answer for [redacted]"
    assert "TimeoutError: no answer for [redacted]" in recorded(store, "r")
    assert f"the call of effect 'charge' {unknown}" in caplog.text
    await runner.run([reconciled], Person(ssn=SSN), run_id="s")
    assert "did not happen: there is no [redacted]" in caplog.text
    assert f"the call of effect 'reconciled' {unknown}" not in caplog.text  # It was settled at once.
    assert SSN not in caplog.text + recorded(store, "r") + recorded(store, "s")


@pytest.mark.core
@pytest.mark.parametrize(
    ("redact", "question"),
    [
        (hide, "may [redacted] be paid?"),
        (lambda state: {"ssn": state["ssn"][:0]}, "may [redacted] be paid?"),
        (
            lambda state: {name: value.upper() for name, value in state.items() if name != "n"},
            f"MAY {SSN} BE PAID?",
        ),
    ],
    ids=["hides", "raises for messages", "changes messages"],
)
async def test_a_question_is_recorded_without_hidden_values(
    redact: Any, question: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A question of a node is redacted for hooks, log, store and result; it is never hidden as a whole."""
    caplog.set_level(logging.INFO, "stroma")
    asked: list[str] = []

    on_node_suspended = noting(asked, lambda _run, _node, reason: reason)

    async def ask(state: Person) -> Done:
        raise Suspend(f"may {state.ssn} be paid?")

    runner = quick(redact=redact, hooks=NodeHooks(on_node_suspended=on_node_suspended))
    result = await runner.run([runner.node(ask)], Person(ssn=SSN))
    assert asked == result.suspended == [question]
    assert question in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(
    ("redact", "message"),
    [
        (lambda state: {name: str(value).upper() for name, value in state.items()}, "CANNOT BILL"),
        (lambda state: {}, "[redacted]"),
        (lambda state: {"ssn": state["ssn"]}, "[redacted]"),
        (lambda state: 1 / 0, "[redacted]"),
        (lambda state: [state], "[redacted]"),
    ],
    ids=["changes it", "omits it", "raises for it", "raises", "no dict"],
)
async def test_redact_gets_each_message(redact: Any, message: str) -> None:
    """A redact gets a message as {"message": text}; where it raises or returns none, none is recorded."""

    async def bill(state: Person) -> Done:
        raise ValueError("cannot bill")

    runner = quick(redact=redact, policy_map=NEVER)
    result = await runner.run([runner.node(bill)], Person(ssn="an ssn"))
    assert result.failure.message == message
    assert next(iter(result.trace)).failure_message == message


@pytest.mark.core
async def test_what_the_users_code_raises_is_logged_by_its_type(caplog: pytest.LogCaptureFixture) -> None:
    """With a redact, exceptions of hooks and classifiers, which get the original, are logged by type."""

    async def on_node_failure(_run: str, _node: str, error: Exception, _kind: Any) -> None:
        raise RuntimeError(f"cannot report {error}")

    def classify(error: Exception, _: Any) -> Any:
        raise LookupError(f"unknown: {error}")

    async def use(state: Person) -> Done:
        raise ValueError(f"bad ssn {state.ssn}")

    hooks = NodeHooks(on_node_failure=on_node_failure)
    runner = quick(redact=hide, hooks=hooks, classifiers=[classify], policy_map=NEVER)
    result = await runner.run([runner.node(use)], Person(ssn=SSN))
    assert "RuntimeError: [redacted]" in caplog.text
    assert "LookupError: [redacted]" in caplog.text
    assert SSN not in caplog.text
    assert SSN in str(result.hook_errors[0].exception)


async def test_an_error_around_steps_has_only_its_type(runner: StromaRunner[Any], store: SQLiteStore) -> None:
    """With a redact, of an error of plain code only the type is recorded: it may quote any step."""

    @runner.node
    async def find(state: Done) -> Person:
        return Person(ssn=SSN)

    ctx = context_of(runner, runner.config.model_copy(update={"run_id": "r"}))
    with pytest.raises(ValueError, match=SSN):
        async with ctx:
            found = await execute_step("find", find, Done(), ctx)
            raise ValueError(f"bad ssn {found.final_state.ssn}")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=SSN):
        async with Guard(runner).run(run_id="s"):
            raise ValueError(f"bad ssn {found.output.ssn}")
    for run_id in ("r", "s"):
        record = store.get_run(run_id)
        assert record.error == "ValueError: [redacted]"


@pytest.mark.core
async def test_a_changed_call_is_named_by_its_fields(
    runner: StromaRunner[Any], store: SQLiteStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed input of a call is named by its fields in message, log and store; the caller gets both."""
    number = 1

    @runner.node
    async def look(state: Person) -> Person:
        return state

    @runner.flow
    async def changes(flow: Flow, state: Person) -> Person:
        found = await flow.step(look, Person(ssn=state.ssn, n=number))
        await flow.receive(Done)
        return found

    await runner.run(changes, Person(ssn=SSN), run_id="r")
    number = 2
    await runner.send("r", Done())
    blocked = await runner.drive("r")
    assert "with other values of 'n'" in str(blocked)
    assert SSN not in str(blocked) + caplog.text + str(store.get_run("r"))
    with pytest.raises(Exception, match="with other values of 'n'") as raised:
        await runner.resume(changes, "r")
    inputs: Any = raised.value
    assert [json.loads(one)["n"] for one in inputs.inputs] == [1, 2]


@pytest.mark.core
async def test_a_redact_may_change_its_argument(store: SQLiteStore, runner: StromaRunner[Any]) -> None:
    """G7: A redact that changes the dict it gets hides as one that returns another; the trace stays."""

    @runner.node
    async def keep(state: Person) -> Person:
        return state

    @runner.node
    async def use(state: Person) -> Done:
        raise ValueError(f"bad ssn {state.ssn}")

    result = await runner.run([keep, use], Person(ssn=SSN), run_id="r")
    for _ in range(2):
        assert SSN not in result.to_html(redact=hide) + result.trace.to_html(redact=hide)
    assert [event.input_state["ssn"] for event in result.trace] == [SSN, SSN]
    recording = json.dumps(RecordedRun.read(store, "r", redact=hide).to_json())
    assert SSN not in recording
    assert "bad ssn [redacted]" in recording
    assert History(store, hide).output_at("r", 0).value == {"ssn": "***", "n": 0}
    plain = await quick(policy_map=NEVER).run([keep, use], Person(ssn=SSN))
    assert SSN in plain.to_html()
    assert SSN not in plain.to_html(redact=hide)


def shown(text: str, state: dict[str, Any]) -> str:
    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {k: v if k in ("message", "shown") else "***" for k, v in state.items()}

    return hide_words(redact, text, forms_to_hide(removed_values(redact, [state])))


def test_short_values_are_hidden_as_whole_words() -> None:
    """A value of one to three characters is removed where it stands by itself, and in no longer word."""
    state = {"cvv": "123", "illness": "HIV", "n": 7, "shown": "ok", "flag": True, "empty": ""}
    assert shown("cvv 123, (hiv) at 7: 1234 hive 17 a7 ok True", state) == (
        "cvv [redacted], ([redacted]) at [redacted]: 1234 hive 17 a7 ok True"
    )


def test_keys_of_removed_dicts_are_hidden() -> None:
    """Keys of a dict inside of a state are hidden with it; names of the state's own fields are not."""
    state = {"salaries": {"ada@example.org": 54321}, "shown": {"grace": 1}}
    assert shown("no salaries for ada@example.org, 54321 for grace", state) == (
        "no salaries for [redacted], [redacted] for grace"
    )


def test_dates_are_hidden_as_messages_write_them() -> None:
    """A removed date or time is hidden as JSON, ``str()`` and ``repr()`` write it."""
    born = datetime(1990, 5, 17, 13, 45, 10)
    state = {"born": born, "seen": born.replace(tzinfo=UTC), "day": date(1991, 6, 18), "at": time(14, 55, 7)}
    for value in state.values():
        for text in (str(value), repr(value), value.isoformat()):
            assert re.sub(r"\W*(tzinfo=\S+)?\)?$", "", shown(f"no slot for {text}", state)) == (
                "no slot for [redacted"
            ), text
