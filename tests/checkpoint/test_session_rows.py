"""What a session of a durable store leaves of each attempt, under a codec, too, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from tests.checkpoint.one_store import (
    REF,
    SCHEMA,
    Counting,
    State,
    Store,
    attempt,
    committed,
    lose,
    row,
    sealed_row,
    store_fixture,
    stored,
)

from stroma.checkpoint import (
    CorruptCheckpoint,
    PipelineChanged,
    StepCall,
    StoreError,
)
from stroma.checkpoint.durable.owner import LIVE_SESSIONS, Owner
from stroma.checkpoint.durable.rows import Annotation, Fence, Step
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.payloads import CODED, PayloadPlace, Payloads
from stroma.checkpoint.records import AttemptRecord, stored_values
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage, RunStatus
from stroma.trace.events import AttemptRow, Failed

store = store_fixture()


# ---------------------------------------------------------------------- through a codec


async def test_the_same_input_through_a_codec(store: Store) -> None:
    """Its bytes are others each time, and it is the same input all the same; another one is another one."""
    payloads = Payloads(Counting())
    lose(store.open(payloads=payloads))
    place = PayloadPlace("r", 1, "input").digest()
    assert store.table("inputs")[0][3] == CODED + b"1|" + (place + stored(0))[::-1]
    session = store.open(payloads=payloads, if_exists="resume")
    assert session.continued
    lose(session)
    with pytest.raises(PipelineChanged):
        store.open(n=1, payloads=payloads, if_exists="resume")
    # A store that has a codec now still reads what it wrote without one, as long as it is asked to.
    lose(store.open("plain"))
    migrating = Payloads(Counting(), plain_until_migrated=True)
    assert store.open("plain", payloads=migrating, if_exists="resume").continued


async def test_an_input_that_is_damaged(store: Store) -> None:
    """A damaged input stops a resume; the codec does not see it."""
    codec = Counting()
    lose(store.open(payloads=Payloads(codec)))
    store.db.execute("UPDATE inputs SET input = CAST(input || x'00' AS BLOB)")
    with pytest.raises(CorruptCheckpoint, match="the input of run 'r' is damaged"):
        store.open(payloads=Payloads(codec), if_exists="resume")
    assert codec.opened == 0


async def test_commits_through_a_codec(store: Store) -> None:
    """Outputs and inputs of steps are sealed; a resume decrypts an output when its node is reached."""
    codec = Counting()
    payloads = Payloads(codec)
    session = store.open(payloads=payloads)
    await session.record(row(0), SCHEMA, State(n=1), StepCall(2, b"given"))
    await session.record(row(1, 20), SCHEMA, State(n=2), StepCall(3, None))
    await session.record(row(2, 30), SCHEMA, State(n=3))
    await session.record(row(3, 40), None, None)
    first, second, third = store.rows.steps(1, 1)

    def coded(number: int, data: bytes, position: int, kind: str = "output") -> bytes:
        return CODED + b"%d|" % number + (PayloadPlace("r", 1, kind, position).digest() + data)[::-1]

    assert first.step.output == coded(2, stored(1), 0)
    assert first.step.input_key == coded(3, b"given", 0, "step input")
    assert (second.step.output, second.step.number, second.step.input_key) == (
        coded(4, stored(2), 1),
        3,
        None,
    )
    assert (third.step.output, third.step.number, third.step.input_key) == (
        coded(5, stored(3), 2),
        None,
        None,
    )
    assert all(sealed_row(*one) == one for one in (first, second, third))
    findings = {
        0: committed(1, call=StepCall(2, b"given")),
        1: committed(2, call=StepCall(3, None)),
        2: committed(3),
    }
    assert await session.committed(0, [""]) == {"": findings[0]}
    assert codec.opened == 2
    lose(session)
    again = store.open(payloads=payloads, if_exists="resume")
    assert codec.opened == 4  # The input, and what the first was given.
    assert [one.output.load() for one in again.restored.values()] == [stored(n) for n in (1, 2, 3)]
    assert codec.opened == 7


async def test_what_cannot_be_opened_is_named(store: Store) -> None:
    """The output of which node, at which place, of which run; and so for what a step was given."""
    payloads = Payloads(Counting())
    session = store.open(payloads=payloads)
    await session.record(row(3), SCHEMA, State(n=1))
    await session.record(row(4, 20), SCHEMA, State(n=1), StepCall(2, b"given"))
    session = DurableSession("r", store.submit, Payloads())
    session.fence = Fence(1, 1, 1, "", 0.0)
    for position, what in ((3, ""), (4, "the input of the step for ")):
        with pytest.raises(CorruptCheckpoint) as caught:
            await session.committed(position, [""])
        assert str(caught.value) == (
            f"{what}the output of node 'node' at position {position} of run 'r' was written through a codec; "
            "open the store with codec="
        )


# ---------------------------------------------------------------------- what it keeps


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (row(), attempt()),
        (row(3, 12, "1.0", 4, node="n"), attempt(3, 12, "1.0", 4, node_id="n")),
        (row(usage=None), attempt(tokens=0, output_tokens=0, cost_pico=0, model=None)),
        (
            row(usage=AttemptUsage(9, 4, 1e-12 * 2.6, None)),
            attempt(tokens=9, output_tokens=4, cost_pico=3, model=None),
        ),
        (
            row(usage=AttemptUsage(0, 0, 2.0, "\0\ud800")),
            attempt(tokens=0, output_tokens=0, cost_pico=2 * 10**12, model="\\x00\\ud800"),
        ),
        (
            row(failed=Failed(FailureClass.TERMINAL, "m\0", "r\ud800", "T\0")),
            attempt(
                outcome="failure",
                failure_class="TERMINAL",
                message="m\\x00",
                reason="r\\ud800",
                error_type="T\\x00",
            ),
        ),
        (
            row(failed=Failed(FailureClass.AMBIGUOUS, "m", None, "KeyError")),
            attempt(
                outcome="failure", failure_class="AMBIGUOUS", message="m", reason=None, error_type="KeyError"
            ),
        ),
    ],
)
async def test_an_attempt_is_kept_with_all_that_is_told_of_it(
    store: Store, value: AttemptRow, entry: AttemptRecord
) -> None:
    """Costs are whole pico-dollars; text that no store can keep is written out."""
    session = store.open()
    await session.record(value, None, None)
    assert list(store.rows.attempts(1, 1)) == [(entry, None)]
    assert store.annotations() == []


async def test_an_output_is_kept_with_its_schema(store: Store) -> None:
    """And with the group that it belongs to, and what a resumed run knows its step by; without a schema it is
    not kept."""
    session = store.open()
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, group="g"), SCHEMA, State(n=2), StepCall(0, None))
    await session.record(row(2, 30), SCHEMA, State(n=3), StepCall(7, b"given"))
    await session.record(row(3, 40), SCHEMA, None)
    await session.record(row(4, 50), None, State(n=4))
    plain = SCHEMA.fingerprint

    def step(contract: str, n: int, *call: Any) -> Step:
        return Step(contract, REF, stored(n), b"", *call)

    assert store.rows.steps(1, 1) == [
        sealed_row(0, "", "node", step(plain, 1)),
        sealed_row(1, "", "node", step(f"{plain}:g", 2, 0, None)),
        sealed_row(2, "", "node", step(plain, 3, 7, b"given")),
    ]
    assert len(store.table("attempts")) == 5
    assert await session.committed(1, [""]) == {
        "": committed(2, call=StepCall(0, None), contract=f"{plain}:g")
    }


async def test_end_hooks_are_due_with_each_attempt(store: Store) -> None:
    """Where they are asked for, until they were told, each by itself; that nobody waits for."""
    session = store.open(deliver=True)
    await session.record(row(0), SCHEMA, State(n=1))
    await session.record(row(1, 20, "0", 3), None, None)
    due = store.rows.annotations(1, Annotation.DUE_HOOKS)
    assert [(one.branch, one.node_id, json.loads(one.step.output)) for one in due] == [
        ("0:10:1:", "node", list(stored_values(attempt()))),
        ("1:20:3:0", "node", list(stored_values(attempt(1, 20, "0", 3)))),
    ]
    assert due == [sealed_row(*one[:3], Step("", "", one.step.output, b"")) for one in due]
    assert len(store.rows.steps(1, 1)) == 1
    session.delivered(row(0))
    await asyncio.sleep(0)
    assert [one.branch for one in store.rows.annotations(1, Annotation.DUE_HOOKS)] == ["1:20:3:0"]
    session.delivered(row(1, 20, "0", 3))
    await asyncio.sleep(0)
    assert store.rows.annotations(1, Annotation.DUE_HOOKS) == []


@pytest.mark.parametrize("deliver", [False, True])
async def test_where_an_attempt_failed_is_kept_with_it(store: Store, deliver: bool) -> None:
    """Once, at its place, in place of what failed there before; of another attempt's trouble nothing is
    kept."""
    session = store.open(deliver=deliver)
    failed = Failed(FailureClass.AMBIGUOUS, "no", None, "KeyError")
    session.record_failure_site(1, "0", 3, 20, lambda: b"frames")
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == []
    await session.record(row(1, 10, "1"), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == []
    await session.record(row(1, 20, "0", 3, failed=failed), None, None)
    first = sealed_row(Annotation.FAILURE_SITE, "1:0", "node", Step("20", "", b"frames", b"", 3))
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == [first]
    await session.record(row(1, 30, "0", 4, failed=failed), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == [first]
    session.record_failure_site(1, "0", 5, 40, lambda: b"others")
    await session.record(row(1, 41, "0", 5, failed=failed), None, None)
    await session.record(row(1, 40, "0", 6, failed=failed), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == [first]
    session.record_failure_site(1, "0", 7, 50, lambda: b"")
    await session.record(row(1, 50, "0", 7, failed=failed), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == [first]
    session.record_failure_site(1, "0", 8, 60, lambda: b"later")
    await session.record(row(1, 60, "0", 8, failed=failed), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == [
        sealed_row(Annotation.FAILURE_SITE, "1:0", "node", Step("60", "", b"later", b"", 8))
    ]
    assert len(store.rows.annotations(1, Annotation.DUE_HOOKS)) == (7 if deliver else 0)
    assert len(store.table("attempts")) == 7


async def test_lines_of_source_do_not_stand_beside_what_a_codec_hides(store: Store) -> None:
    """They are not even read."""
    session = store.open(payloads=Payloads(Counting()))
    read: list[int] = []

    def write() -> bytes:
        read.append(1)
        return b"frames"

    session.record_failure_site(0, "", 1, 10, write)
    await session.record(row(0, 10), None, None)
    assert store.rows.annotations(1, Annotation.FAILURE_SITE) == []
    assert read == []


@pytest.mark.parametrize("fails", [StoreError, asyncio.CancelledError])
async def test_what_nobody_waits_for_may_fail(store: Store, fails: type[BaseException]) -> None:
    """Without a word of the event loop."""
    messages: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: messages.append(context))
    session = store.open()
    store.fails = fails
    session.note_traceparent("00-a-b-01")
    session.delivered(row())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert store.operations == 2
    assert messages == []


# ---------------------------------------------------------------------- its end


@pytest.mark.parametrize(
    ("status", "error", "entry"),
    [(RunStatus.COMPLETED, None, ("COMPLETED", None)), ("PARTIAL", "why\0", ("PARTIAL", "why\\x00"))],
)
async def test_the_end_is_kept(store: Store, status: Any, error: str | None, entry: tuple[str, Any]) -> None:
    """And nobody holds the run any more, once it is."""
    session = store.open()
    token = Owner.read(session.fence.owner).token
    pending = session.end(status, error)
    assert pending is not None
    assert session.ended
    assert token in LIVE_SESSIONS
    await pending
    await asyncio.sleep(0)
    assert token not in LIVE_SESSIONS
    result = store.rows.find("r")
    assert result is not None
    assert (result.status, result.error, result.holder) == (*entry, None)
