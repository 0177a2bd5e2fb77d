"""Records of the flows of a run: the events that their bodies got, in order, and what the bodies observed.

An event is numbered when its record is written, and delivered to the body once it is stored, in the order of
the numbers. So whatever a body did after an event is recorded after that event, and a replay that delivers
the recorded events repeats it.

The number of an output is part of its commit (:class:`StepCall`). All else is a note of the session, under
``position:kind:key``; :mod:`stroma.checkpoint.flow_notes` has the forms.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable
from contextvars import ContextVar
from heapq import heappop, heappush
from time import perf_counter_ns
from typing import Any, Final, NamedTuple, cast

from pydantic import BaseModel

from stroma._utils.access import kind_of
from stroma.checkpoint import Committed, Session, StepCall
from stroma.checkpoint.decoding import RecordName, decode_number, storable_text
from stroma.checkpoint.entries import OF_FLOW, SentMessage
from stroma.checkpoint.flow_notes import FailureNote, MessageNote, decode_flow_note
from stroma.checkpoint.identity import is_called, with_outer, without_attempts
from stroma.contracts.node import Group, Node, contract_of_node
from stroma.contracts.schema import Schema, comparable, schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import intents, write_intent
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed
from stroma.failures.failure import Failure

#: Set while ``check_deterministic`` replays, to the branches of the calls that the run made: any other call
#: is a change, and one of these without a record had failed, and ends the replay.
REPLAY_ONLY: Final[ContextVar[frozenset[str] | None]] = ContextVar("stroma_replay_only", default=None)


class Event(NamedTuple):
    """A recorded event. Events are delivered in the order of their numbers, which begin at 1."""

    number: int
    branch: str = ""  # Of the call that has ended; "" for the end of timers.
    failure: FailureNote | None = None  # Of a call that failed.
    time_ms: int = 0  # The time at which timers end, since the epoch.
    received: MessageNote | None = None  # The message that a call got.
    source: str = ""  # The branch of the discarded output that a call took.


class FlowRecords:
    """The records of the flow at one position of a run."""

    def __init__(self) -> None:
        self.events: list[Event] = []  # To replay, in order.
        #: Outputs by branch that followed a failure which is retried, and those that no call has taken, by
        #: node and input.
        self.loose: dict[str, Committed] = {}
        self._untaken: dict[tuple[str, bytes | None], list[str]] = {}
        #: Nodes and classes of inputs that :meth:`renew_keys` was called with.
        self._renewed: set[tuple[str, Schema]] = set()
        #: Identities of the calls that must be made again, by the branch of their flow and their number.
        self.calls: dict[tuple[str, int | None], str] = {}
        #: Nodes of the effects whose call must be made again, by its branch: its outcome is unknown.
        self.unknown: dict[str, str] = {}
        #: The time that the body observed after an event, in ms since the epoch, by the number of the event.
        self.times: dict[int, int] = {}
        #: First and last number of the events that no longer hold, for each retried failure.
        self.discarded: list[tuple[int, int]] = []
        self.last = 0  # The highest number of an event.
        #: The last event before the run was suspended, and the branches that the body waited for then.
        self.suspended: tuple[int, list[str]] | None = None
        self.seed: bytes | None = None

    def free_outputs(self, taken: set[str]) -> None:
        """Free the loose outputs that no recorded event has, in the order in which they were committed."""
        self.loose = dict(sorted(self.loose.items(), key=lambda item: -step_of(item[1]).number))
        for branch in self.loose:
            if branch not in taken:
                self._untaken.setdefault(self._key_of(branch), []).append(branch)

    def take_output(self, node_id: str, input_key: bytes | None, branch: str) -> str:
        """Return the branch of a free output for a call, which no other call gets; "" without one.

        An input that cannot be compared equals no other one: only the call at the same place has its output.
        """
        for key in ((node_id, input_key), (branch, None)):
            if free := self._untaken.get(key):
                return free.pop(0)
        return ""

    def renew_keys(self, node_id: str, schema: Schema) -> None:
        """Compare the inputs of the loose outputs of a node as a class has them now."""
        if (node_id, schema) in self._renewed:
            return
        self._renewed.add((node_id, schema))
        for branch, output in self.loose.items():
            step = step_of(output)
            if output.node_id != node_id or (key := schema.renew_key(step.input_key)) == step.input_key:
                continue
            free = self._untaken.get(self._key_of(branch), [])
            self.loose[branch] = output._replace(step=step._replace(input_key=key))
            if branch in free:
                free.remove(branch)
                self._untaken.setdefault(self._key_of(branch), []).append(branch)

    def put_back(self, branch: str) -> None:
        """Free an output that a call has taken, and that the body has not received."""
        self._untaken.setdefault(self._key_of(branch), []).insert(0, branch)

    def _key_of(self, branch: str) -> tuple[str, bytes | None]:
        output = self.loose[branch]
        input_key = comparable(step_of(output).input_key)
        return (output.node_id, input_key) if input_key is not None else (branch, None)

    def has_noticed(self, number: int) -> bool:
        """Return True if a body that replays the records notices an event."""
        return number <= self.last and not any(first <= number <= last for first, last in self.discarded)

    def add_call(self, branch: str) -> None:
        """Note a call, and those of the flows around it, as calls that have to be made again."""
        for outer in with_outer(branch):
            flow, _, identity = outer.rpartition(".")
            number = number_of(identity)
            if number is not None:
                self.calls[flow, number] = identity


def step_of(output: Committed) -> StepCall:
    """Return the call that an output of a flow was committed with."""
    assert output.step is not None  # A flow has it.
    return output.step


def number_of(identity: str) -> int | None:
    """Return the number of a call in its flow; None for one with a key, and for an item of a map."""
    name, mark, number = identity.partition("@")[0].rpartition("#")
    return int(number) if mark and name not in ("", "*", "!", "?") and number.isdecimal() else None


class FlowJournal:
    """The records of all flows of one run."""

    def __init__(self, ctx: ReliabilityContext) -> None:
        self._ctx = ctx
        self._flows: dict[int, FlowRecords] = {}
        #: Keys of the notes about events and observed times, by position and number.
        self._numbered: dict[tuple[int, int], list[str]] = {}
        #: Function time of earlier processes that no committed row has, in ns, by the position of the flow.
        self._busy: dict[int, int] = {}
        self.inbox = Inbox()
        #: The body has received a time or a random value that is not stored yet.
        self.has_new_values = False
        session = ctx.session
        if not (session.continued or session.notes):
            return
        if ctx.journal.restored is session.restored:
            # A copy, from which flows remove what they have restored.
            ctx.journal.restored = dict(ctx.journal.restored)
        for key, data in dict(session.notes).items():
            self._read_note(key, data)
        for (position, branch), committed in ctx.journal.restored.items():
            step = committed.step
            if branch and step is not None and step.number < OF_FLOW:
                self._add_output(position, branch, committed)
        for position, records in self._flows.items():
            self._finish(position, records)
        ctx.cost_tracker.prior_latency_ms += sum(self._busy.values()) / 1e6

    def _read_note(self, key: str, data: bytes) -> None:
        run_id = self._ctx.run_id
        number, kind, rest = [*key.split(":", 2), "", ""][:3]
        name = RecordName(run_id, "note", key)
        position = decode_number(number, name)
        value = decode_flow_note(run_id, key, kind, data)
        records = self.records(position)
        if kind == "b":
            self._busy[position] = value
        elif kind == "d":
            records.discarded = [(first, last) for first, last in value]
            records.last = max([records.last, *(last for _, last in records.discarded)])
        elif kind == "seed":
            records.seed = data
        elif kind == "n":
            records.suspended = value
            self._remember(position, value[0], key)
        elif kind == "v":
            at = decode_number(rest, name)
            records.times[at] = value
            self._remember(position, at, key)
        elif kind == "f":
            self._add(position, Event(value.event, rest, failure=value), key)
        elif kind == "m":
            self._add(position, Event(value.event, rest, received=value), key)
            self.inbox.known.add(value.number)
        elif kind == "e":
            branch, time_ms, source = value
            self._add(position, Event(decode_number(rest, name), branch, time_ms=time_ms, source=source), key)

    def _add(self, position: int, event: Event, key: str | None) -> None:
        records = self.records(position)
        records.events.append(event)
        records.last = max(records.last, event.number)
        if key is not None:
            self._remember(position, event.number, key)

    def _add_output(self, position: int, branch: str, committed: Committed) -> None:
        records, number = self.records(position), OF_FLOW - step_of(committed).number
        records.last = max(records.last, number)
        if records.has_noticed(number):
            self._add(position, Event(number, branch), None)
        else:
            records.loose[branch] = committed

    def _finish(self, position: int, records: FlowRecords) -> None:
        """Put the events in order, and note the calls that must be made again."""
        records.events.sort(key=lambda one: one.number)
        records.free_outputs({event.source for event in records.events})
        for event in records.events:
            records.add_call(event.branch)
        if not records.discarded:
            questions = [at for at, one in self._ctx.session.waiting.items() if one.effect is None]
            for at, branch in (*(self._ctx.journal.tried or ()), *questions):
                if at == position and is_called(branch):
                    records.add_call(branch)
        for place, intent in intents(self._ctx, position).items():
            if intent.is_unknown and intent.event is not None:
                if records.has_noticed(intent.event):
                    records.unknown[without_attempts(intent.branch)] = intent.node_id
                else:
                    write_intent(self._ctx, place, intent._replace(event=None))

    def input_key_of(self, position: int, event: Event) -> bytes | None:
        """Return the input of the call that an event ends, in stored form; None if it is not recorded."""
        if event.failure is not None:
            text = event.failure.input_key
            return None if text is None else comparable(text.encode())
        committed = self._ctx.journal.restored.get((position, event.source or event.branch))
        return None if committed is None or committed.step is None else comparable(committed.step.input_key)

    def records(self, position: int) -> FlowRecords:
        """Return the records of the flow at a position."""
        return self._flows.setdefault(position, FlowRecords())

    def forget_output(self, position: int, branch: str) -> None:
        """Drop an output that was handed out."""
        cast("dict[tuple[int, str], Committed]", self._ctx.journal.restored).pop((position, branch), None)

    # ------------------------------------------------------------------ writing

    def _note(self, position: int, kind: str, key: object, data: Any, number: int | None = None) -> None:
        """Have a note stored with the next record; None deletes it. ``number``: of the event it is about."""
        name = f"{position}:{kind}:{key}"
        self._ctx.session.note(name, None if data is None else json.dumps(data).encode())
        if number is not None:
            self._remember(position, number, name)

    def _remember(self, position: int, number: int, key: str) -> None:
        self._numbered.setdefault((position, number), []).append(key)

    def note_failure(
        self, position: int, number: int, branch: str, failure: Failure, input_key: bytes | None
    ) -> None:
        """Record the failure of a call."""
        fields = FailureNote(
            event=number,
            node=failure.node_id,
            kind=failure.failure_class,
            message=storable_text(failure.message) or "",
            reason=storable_text(failure.reason),
            attempt=failure.attempt,
            type=kind_of(failure.exception),
            retry_after=failure.retry_after_seconds,
            mark=failure.mark,
            input_key=None if input_key is None else input_key.decode(),
        )
        self._note(position, "f", branch, fields, number)

    def note_message(
        self, position: int, number: int, branch: str, message: SentMessage, problem: str | None
    ) -> None:
        """Record the message that a call gets, and why it does not fit."""
        fields = MessageNote(
            event=number,
            number=message.number,
            topic=message.topic,
            id=message.id,
            payload=message.payload.decode(),
            problem=storable_text(problem),
            at_ms=(perf_counter_ns() + self._ctx.journal.epoch_ns) / 1e6,
        )
        self._note(position, "m", branch, fields, number)

    def free_message(self, position: int, branch: str, message: SentMessage) -> None:
        """Record that the body had given a call up before it got its message, which another call may take."""
        self._note(position, "m", branch, None)
        self.inbox.put_back(message)

    def note_event(self, position: int, event: Event) -> None:
        """Record an event whose number no commit has."""
        data = [event.branch, event.time_ms, event.source]
        self._note(position, "e", event.number, data, event.number)

    def note_time(self, position: int, number: int, time_ms: int) -> None:
        """Record the time that a body observed after an event."""
        self.has_new_values = True
        self._note(position, "v", number, time_ms, number)

    def note_wait(self, position: int, branch: str, wake_ms: int, began_ms: float) -> None:
        """Record when a sleep, or a time limit, ends and began, for those who look at the run."""
        recorded = self._ctx.session.notes.get(f"{position}:s:{branch}")
        if recorded is None or json.loads(recorded)[0] != wake_ms:  # Else it is replayed.
            self._note(position, "s", branch, [wake_ms, began_ms])

    def note_receive(self, position: int, branch: str, topic: str, began_ms: float) -> None:
        """Record that a call waits for a message, for those who look at the run."""
        if f"{position}:r:{branch}" not in self._ctx.session.notes:
            self._note(position, "r", branch, [topic, began_ms])

    def forget_receive(self, position: int, branch: str) -> None:
        """Record that a call has given up its wait for a message, for those who look at the run."""
        self._note(position, "r", branch, None)

    def note_expired(self, position: int, branch: str) -> None:
        """Record that no answer, or no message, came in time, for those who look at the run."""
        self._note(position, "x", branch, True)

    def note_suspension(self, position: int, number: int, branches: list[str]) -> None:
        """Record the last event before the run is suspended, and the calls that the body waits for."""
        self._note(position, "n", "", [number, branches], number)

    def note_busy(self, position: int, busy_ns: int) -> None:
        """Record the function time of a flow in this process; 0 once its own row has it."""
        self._note(position, "b", "", self._busy.get(position, 0) + busy_ns or None)

    def discard_from(self, position: int, first: int, last: int) -> None:
        """Discard the events from a number on: the failure that it belongs to is to be retried."""
        for at, number in [one for one in self._numbered if one[0] == position and one[1] >= first]:
            for key in self._numbered.pop((at, number)):
                self._ctx.session.note(key, None)
        records = self.records(position)
        records.discarded.append((first, last))
        self._note(position, "d", "", records.discarded)

    def seed(self, position: int) -> bytes:
        """Return the seed of the random values of this execution of the run."""
        records = self.records(position)
        if records.seed is None:
            self.has_new_values = True
            records.seed = os.urandom(16)
            self._ctx.session.note(f"{position}:seed:", records.seed)
        return records.seed


def read_failure(fields: FailureNote) -> Failure:
    """Return the failure that :meth:`FlowJournal.note_failure` recorded."""
    return Failure(
        RunFailed.recorded(fields.message, fields.type),
        fields.kind,
        fields.node,
        fields.attempt,
        fields.message,
        fields.reason,
        fields.retry_after,
        mark=fields.mark,
    )


def message_of(fields: MessageNote) -> SentMessage:
    """Return the message that :meth:`FlowJournal.note_message` recorded."""
    return SentMessage(fields.number, fields.topic, fields.id, fields.payload.encode())


def misfit_of(problem: str) -> Failure:
    """Return the failure of a call that got a message with a problem."""
    error = RunFailed.recorded(problem, "ValidationError")
    return Failure(error, FailureClass.TERMINAL, "receive", 1, problem, "contract")


def input_schema(ctx: ReliabilityContext, node: Node | Group, state: BaseModel) -> Schema:
    """Return the schema that the input of a call is recorded with."""
    contract = contract_of_node(node, ctx.registry)
    return schema_of(type(state) if contract is None else contract.input_schema)


def encode_input(ctx: ReliabilityContext, node: Node | Group, state: BaseModel) -> bytes | None:
    """Return the input of a call in stored form, as its node's contract has it; None if it has none."""
    schema = input_schema(ctx, node, state)
    try:
        model = state if type(state) is schema.model else schema.convert(state)
        return schema.input_key(model, is_sealed=ctx.session.stores_secrets)
    except ValueError:  # The contract refuses it, which the attempt records.
        return None


class Inbox:
    """The messages to one run that were read, and those that its flows have taken."""

    def __init__(self) -> None:
        self._free: dict[str, list[SentMessage]] = {}
        self.known: set[int] = set()  # Numbers of the messages that are free here, or that a call has taken.
        self._last_read = 0

    def has(self, topic: str) -> bool:
        return bool(self._free.get(topic))

    def take(self, topic: str) -> SentMessage:
        """Return the first free message of a topic that has one; no other call gets it."""
        return heappop(self._free[topic])

    def put_back(self, message: SentMessage) -> None:
        """Free a message that a call has taken."""
        heappush(self._free.setdefault(message.topic, []), message)

    async def read(self, session: Session) -> None:
        """Read the messages that have come since the last call. Raises StoreError."""
        while self._last_read + 1 in self.known:  # They need not be read again.
            self._last_read += 1
        messages = session.messages(self._last_read)
        for message in await messages if isinstance(messages, Awaitable) else messages:
            self._last_read = message.number
            if message.number not in self.known:
                self.known.add(message.number)
                self.put_back(message)
