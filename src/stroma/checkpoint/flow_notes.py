"""Forms of the notes that flows record beside their commits. ``runner/flows/journal.py`` writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from stroma.checkpoint.decoding import RecordName, decode_json, decode_number
from stroma.checkpoint.entries import OF_FLOW, StepCall
from stroma.checkpoint.errors import CheckpointNotFound
from stroma.checkpoint.identity import with_outer
from stroma.failures.classes import FailureClass


class FailureNote(NamedTuple):
    """The failure of a call.

    Attributes:
        event: the number of the event.
        input_key: the input in stored form.
        mark: see Failure.
    """

    event: int
    node: str
    kind: FailureClass
    message: str
    reason: str | None
    attempt: int
    type: str | None
    retry_after: float | None
    input_key: str | None
    mark: str | None


class MessageNote(NamedTuple):
    """The message that a call of a flow got.

    Attributes:
        event: the number of the event.
        number: the number of the message.
        problem: why it does not fit the class of the call.
        at_ms: when the call got it, since the epoch.
    """

    event: int
    number: int
    topic: str
    id: str
    payload: str
    problem: str | None
    at_ms: float


#: By kind: the function time of a flow ("b"), discarded events ("d"), an event ("e": branch, time, branch of
#: the discarded output that the call took), a failure ("f"), a message ("m"), calls for which the run is
#: suspended ("n"), the topic and the start of a wait for a message ("r"), the end and the start of a wait
#: ("s"), the time that a body observed ("v"), when a question was asked ("w") and that a wait expired ("x").
_SHAPES: Final[dict[str, Any]] = {
    "b": int,
    "d": list[tuple[int, int]],
    "e": tuple[str, int, str],
    "f": FailureNote,
    "m": MessageNote,
    "n": tuple[int, list[str]],
    "r": tuple[str, float],
    "s": tuple[int, float],
    "v": int,
    "w": float,
    "x": bool,
}
#: The last second that a datetime has, in ms since the epoch.
LAST_MS: Final = 253_402_300_799_000


def decode_flow_note(run_id: str, key: str, kind: str, data: bytes) -> Any:
    """Return the value of a note of a flow; the data of a kind without a form. Raises CorruptCheckpoint."""
    name = RecordName(run_id, "note", key)
    if kind not in _SHAPES:
        return data
    value = decode_json(data, _SHAPES[kind], name)
    time_ms = value if kind == "v" else value[1] if kind == "e" else 0
    if not 0 <= time_ms <= LAST_MS:
        raise name.damaged("its time is not a date")
    return value


def message_label(topic: str) -> str:
    """Return the label of a wait for a message."""
    return f"message on {topic!r}" if topic else "message"


class FlowCut(NamedTuple):
    """The part of the flow at one position that comes before the end of one of its calls.

    Attributes:
        number: of the event that this end is.
        branch, node_id: of this call.
        numbers: those of the events by the branch of their call; the highest one of others under "".
    """

    number: int
    branch: str
    node_id: str
    numbers: Mapping[str, int]

    def has_call(self, branch: str) -> bool:
        """Return True for the output of a call that ended before, and for those inside it."""
        numbered = next((one for one in with_outer(branch) if one in self.numbers), None)
        return numbered is not None and self.numbers[numbered] < self.number

    def has_note(self, run_id: str, key: str, data: bytes) -> bool:
        """Return True for a note about an earlier event, and for what holds for the whole flow."""
        _, kind, rest = key.split(":", 2)
        if kind in ("e", "v"):
            return decode_number(rest, RecordName(run_id, "note", key)) < self.number
        if kind in ("f", "m"):
            return bool(decode_flow_note(run_id, key, kind, data).event < self.number)
        return kind in ("d", "seed")


def cut_before(
    run_id: str,
    call: str,
    position: int,
    steps: Iterable[tuple[str, str, StepCall | None]],
    notes: Mapping[str, bytes],
    stopped: tuple[str, str] | None,
) -> FlowCut:
    """Return the part of a flow that comes before the first call of a node, or before the call at a place.

    ``steps``: branch, node id and StepCall of its outputs. ``stopped``: branch and node id of the call whose
    failure stopped the run. The flow did not get it, so all recorded events come before it. Raises
    CheckpointNotFound, CorruptCheckpoint.
    """
    numbers: dict[str, int] = {}
    ends: list[tuple[int, str, str]] = []
    for branch, node_id, step in steps:
        if step is not None and step.number < OF_FLOW:
            numbers[branch] = OF_FLOW - step.number
            ends.append((numbers[branch], branch, node_id))
    for key, data in notes.items():
        at, kind, rest = [*key.split(":", 2), "", ""][:3]
        if at != str(position):
            continue
        if kind == "e":  # Timers have no branch.
            branch = decode_flow_note(run_id, key, kind, data)[0]
            numbers[branch] = max(
                numbers.get(branch, 0), decode_number(rest, RecordName(run_id, "note", key))
            )
        elif kind == "d":
            discarded = decode_flow_note(run_id, key, kind, data)
            numbers[""] = max([numbers.get("", 0), *(last for _, last in discarded)])
        elif kind == "m":
            numbers[rest] = decode_flow_note(run_id, key, kind, data).event
        elif kind == "f":
            failure = decode_flow_note(run_id, key, kind, data)
            numbers[rest] = failure.event
            ends.append((failure.event, rest, failure.node))
    if stopped is not None:
        ends.append((max([0, *numbers.values()]) + 1, *stopped))
    place = call.removeprefix(f"{position}.")
    wanted = [end for end in ends if call == end[2] or place in (end[1], unquote(end[1]))]
    if not wanted:
        raise CheckpointNotFound(
            f"run {run_id!r} has no end of a call {call!r} at position {position}; see its calls with "
            "`stroma show`"
        )
    return FlowCut(*min(wanted), numbers)
