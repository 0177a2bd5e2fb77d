"""Records of the flows of a run: results by the identity of their calls, and the order in which they came.

Outputs are commits of the run. All else is a note of the session (:meth:`Session.note`), which is stored with the next
commit: what a body decided cannot be recorded without what it decided by. Keys are ``position:kind:branch``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, cast

from pydantic import BaseModel

from stroma.checkpoint import Committed
from stroma.checkpoint.decoding import RecordName, decode_number
from stroma.checkpoint.flow_notes import FailureNote, decode_flow_note
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.context import ReliabilityContext
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunFailed
from stroma.failures.failure import Failure, kind_of
from stroma.runner.flows.suspension import WITHDRAWN

__all__ = [
    "CallRecord",
    "FlowJournal",
    "Kind",
    "RecordedFlow",
    "encode_input",
    "input_key_of",
    "read_failure",
]

Kind = Literal["output", "failure", "cancelled", "sleep", "expired", "answer", "started"]

_KINDS: Final[dict[str, Kind]] = {
    "f": "failure",
    "c": "cancelled",
    "s": "sleep",
    "x": "expired",
    "i": "started",
}
#: Of two records of a call, the one that holds: a step may be cancelled after its output was committed.
_RANK: Final = {
    "started": -1,
    "output": 0,
    "sleep": 0,
    "answer": 0,
    "failure": 1,
    "expired": 1,
    "cancelled": 2,
}


class CallRecord(NamedTuple):
    """The recorded result of one call. ``data``: the Committed of an output, else the fields of the note."""

    kind: Kind
    data: Any


class RecordedFlow:
    """Records of one execution of a flow.

    Attributes:
        results: by the identity of the call.
        order: the identities of results that did not simply follow their calls, by their number among all results.
        optional: identities of calls that need not be made again, since they followed a failure that is retried.
    """

    __slots__ = ("optional", "order", "results")

    def __init__(self) -> None:
        self.results: dict[str, CallRecord] = {}
        self.order: dict[int, str] = {}
        self.optional: set[str] = set()

    def add(self, identity: str, recorded: CallRecord) -> None:
        before = self.results.get(identity)
        if before is None or _RANK[before.kind] <= _RANK[recorded.kind]:
            self.results[identity] = recorded


class FlowJournal:
    """The records of all flows of one run; read once, and dropped as the bodies ask for them."""

    def __init__(self, ctx: ReliabilityContext, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._ctx = ctx
        self._random_bytes = random_bytes
        self._flows: defaultdict[tuple[int, str], RecordedFlow] = defaultdict(RecordedFlow)
        self._values: dict[str, bytes] = {}
        #: Notes of calls that come while a replay has not reached all that is recorded. None of them has been made yet.
        self._held: dict[tuple[int, str, str], Any] = {}
        #: Function time of earlier processes that no committed row has, in ns, by the position of the flow.
        self._busy: dict[int, int] = {}
        session = ctx.session
        if not session.continued:
            return
        if ctx.restored is session.restored:
            ctx.restored = dict(ctx.restored)  # A copy, from which flows remove what they have restored.
        for (position, branch), committed in ctx.restored.items():
            if branch:
                flow, _, identity = branch.rpartition(".")
                self._flows[position, flow].add(identity, CallRecord("output", committed))
        for (position, branch), waiting in session.waiting.items():
            if waiting.payload not in (None, WITHDRAWN):
                flow, _, identity = branch.rpartition(".")
                if identity.rpartition("/")[2].startswith("!"):  # Not of a node that waits.
                    self._flows[position, flow].add(identity, CallRecord("answer", waiting.payload))
        for key, data in dict(session.notes).items():
            self._read_note(key, data)
        ctx.cost_tracker.prior_latency_ms += sum(self._busy.values()) / 1e6

    def _read_note(self, key: str, data: bytes) -> None:
        run_id = self._ctx.run_id
        number, kind, rest = [*key.split(":", 2), "", ""][:3]
        position = decode_number(number, RecordName(run_id, "note", key))
        value = decode_flow_note(run_id, key, kind, data)
        if kind == "o":
            index, _, flow = rest.partition(":")
            self._flows[position, flow].order[decode_number(index, RecordName(run_id, "note", key))] = value
        elif kind == "b":
            self._busy[position] = value
        elif kind == "p":
            self._flows[position, rest].optional.update(value)
        elif kind in _KINDS:
            flow, _, identity = rest.rpartition(".")
            # Of a sleep and its start, which is only shown, the end.
            value = value[0] if kind == "s" else value
            self._flows[position, flow].add(identity, CallRecord(_KINDS[kind], value))
        else:
            self._values[key] = data

    def take(self, position: int, flow: str) -> RecordedFlow:
        """Return the records of a flow, and forget them."""
        return self._flows.pop((position, flow), None) or RecordedFlow()

    def has_flow(self, position: int, flow: str) -> bool:
        """Return True if there are records inside a call that were not taken yet."""
        return (position, flow) in self._flows

    def forget_output(self, position: int, branch: str) -> None:
        """Drop an output that was handed out."""
        cast("dict[tuple[int, str], Committed]", self._ctx.restored).pop((position, branch), None)

    # ------------------------------------------------------------------ writing

    def _note(self, position: int, kind: str, branch: str, data: Any, *, is_held: bool = False) -> None:
        if is_held:
            self._held[position, kind, branch] = data
            return
        self._held.pop((position, kind, branch), None)
        encoded = None if data is None else json.dumps(data).encode()
        self._ctx.session.note(f"{position}:{kind}:{branch}", encoded)

    def note_held(self) -> None:
        """Record the notes that were held: all that is recorded was reached."""
        for (position, kind, branch), data in list(self._held.items()):
            self._note(position, kind, branch, data)

    def drop_held(self, position: int, prefix: str) -> None:
        """Drop the notes that were held of the calls of a flow: it ended before all that is recorded was reached."""
        for place in [one for one in self._held if one[0] == position and one[2].startswith(prefix)]:
            del self._held[place]

    def note_failure(
        self,
        position: int,
        branch: str,
        failure: Failure,
        input_key: bytes | None,
    ) -> None:
        """Record a failure."""
        fields: FailureNote = {
            "node": failure.node_id,
            "kind": failure.failure_class.value,
            "message": failure.message,
            "reason": failure.reason,
            "attempt": failure.attempt,
            "type": kind_of(failure.exception),
            "retry_after": failure.retry_after_seconds,
            "input_key": None if input_key is None else input_key.decode(),
        }
        self._note(position, "f", branch, fields)

    def note_cancelled(
        self, position: int, branch: str, seconds: float, input_key: bytes | None, *, is_held: bool
    ) -> None:
        fields = {
            "seconds": round(seconds, 3),
            "input_key": None if input_key is None else input_key.decode(),
        }
        self._note(position, "c", branch, fields, is_held=is_held)

    def note_started(self, position: int, branch: str, input_key: bytes | None, *, is_held: bool) -> None:
        """Record the input of a call that is made of other calls, before it has a result."""
        fields = {"input_key": None if input_key is None else input_key.decode()}
        self._note(position, "i", branch, fields, is_held=is_held)

    def note_wake(self, position: int, branch: str, wake_ms: int, began_ms: float) -> None:
        """Record when a wait ends; its start is for those who look at the run."""
        self._note(position, "s", branch, [wake_ms, began_ms])

    def note_expired(self, position: int, branch: str) -> None:
        self._note(position, "x", branch, True)

    def note_order(self, position: int, flow: str, index: int, identity: str | None) -> None:
        data = None if identity is None else identity.encode()
        self._ctx.session.note(f"{position}:o:{index}:{flow}", data)

    def note_optional(self, position: int, flow: str, identities: set[str]) -> None:
        self._note(position, "p", flow, sorted(identities) or None)

    def note_busy(self, position: int, busy_ns: int) -> None:
        """Record the function time of a flow so far, beyond that of earlier processes; 0 once its own row has it."""
        self._note(position, "b", "", self._busy.get(position, 0) + busy_ns or None)

    def forget(self, kind: Kind, position: int, branch: str) -> None:
        """Delete a note, so that a resume makes the call again."""
        if kind == "cancelled":  # It may have failed before, which the body did not meet.
            self.forget("failure", position, branch)
        elif kind != "started":  # The call may have another input then.
            self.forget("started", position, branch)
            self._forget_inside(position, branch)
        self._note(position, next(key for key, of in _KINDS.items() if of == kind), branch, None)

    def _forget_inside(self, position: int, branch: str) -> None:
        """Delete the ends of calls inside of one that was replayed as a whole."""
        for (at, flow), recorded in self._flows.items():
            if at == position and f"{flow}.".startswith(f"{branch}."):
                for identity, record in recorded.results.items():
                    if record.kind in ("failure", "cancelled"):
                        self.forget(record.kind, position, f"{flow}.{identity}")

    def value(self, position: int, kind: str, branch: str, make: Any) -> bytes:
        """Return the value that is recorded for a call, else record the one that ``make()`` returns."""
        key = f"{position}:{kind}:{branch}"
        data = self._values.get(key)
        if data is None:
            data = make()
            self._ctx.session.note(key, data)
            if kind == "seed":
                self._values[key] = data
        return data

    def seed(self, position: int) -> bytes:
        """Return the seed of the random values of this execution of the run."""
        return self.value(position, "seed", "", lambda: self._random_bytes(16))


def read_failure(fields: FailureNote) -> Failure:
    """Return the failure that :meth:`FlowJournal.note_failure` recorded."""
    return Failure(
        RunFailed.recorded(fields["message"], fields["type"]), FailureClass(fields["kind"]), fields["node"],
        fields["attempt"], fields["message"], fields["reason"], fields["retry_after"],
    )  # fmt: skip


def encode_input(ctx: ReliabilityContext, node: Node | Group, state: BaseModel) -> bytes | None:
    """Return the input of a call in stored form, as its node's contract has it; None if it has none."""
    contract = None if isinstance(node, Group) else ctx.contract_of(node)
    schema = schema_of(type(state) if contract is None else contract.input_schema)
    try:
        return schema.encode(state if type(state) is schema.model else schema.convert(state))
    except (NotSerialisable, ValueError):  # The contract refuses it, which the attempt records.
        return None


def input_key_of(recorded: CallRecord) -> bytes | None:
    """Return the recorded input of a call in stored form; None if there is none."""
    data = recorded.data
    if isinstance(data, Committed):
        return None if data.step is None else data.step.input_key
    input_key = data.get("input_key") if isinstance(data, dict) else None
    return None if input_key is None else str(input_key).encode()
