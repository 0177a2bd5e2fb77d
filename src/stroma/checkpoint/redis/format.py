"""Stored forms of the Redis store: the row of a run, and the values of its hashes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, get_type_hints
from urllib.parse import quote

from stroma.checkpoint.decoding import RecordName, decode_json, decode_number
from stroma.checkpoint.durable.rows import Annotation, RunRow, Step, StepRow
from stroma.checkpoint.entries import Discard
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.records import ATTEMPT_SHAPE, AttemptRecord, stored_values, to_record
from stroma.trace.events import COLLECTED


def annotations_key(kind: int) -> str:
    """Return the key of the annotations of one kind, after the prefix of a run."""
    return "saved" if kind == Annotation.SAVED else f"annotations:{kind}"


#: Format of the stored data, and the key that has its number. A release refuses any other format.
FORMAT: Final = 9
FORMAT_KEY: Final = "stroma:format"
#: The keys of a run, after its prefix, except the states from save(), which expire by themselves.
RUN_KEYS: Final = ("run", "events", *map(annotations_key, sorted(set(Annotation) - {Annotation.SAVED})))
#: The keys of each of its executions; a colon and its number follow.
EXECUTION_KEYS: Final = ("steps", "attempts", "failed", "identities")

#: In place of the node of a damaged step.
DAMAGED: Final = "?"
_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
#: The name of a record whose reader reports its damage by its own name.
_A_RECORD: Final = RecordName("", "record")


@dataclass(slots=True, unsafe_hash=True)
class RedisRun:
    """The key of a run, with its state when it was read or last written.

    Attributes:
        token: differs from that of another run of its id, before or after it was deleted.
        writes: the highest acknowledged number of writes of sessions; a server that has fewer has lost some.
        changes: number of other changes of its row and of its annotations; "" for none.
    """

    run_id: str
    token: str
    epoch: int = field(compare=False)
    writes: int = field(compare=False)
    changes: str = field(default="", compare=False)

    @property
    def state(self) -> tuple[str, str, str]:
        """The fields of its row that differ once it has changed."""
        return self.token, str(self.writes), self.changes

    @property
    def prefix(self) -> str:
        """The prefix of its keys."""
        return prefix_of(self.run_id)


def prefix_of(run_id: str) -> str:
    """Return the prefix of a run's keys."""
    # Percent-encoded, so that the keys of two runs never overlap, and no id contains a brace.
    return f"stroma:{{{quote(run_id, safe='')}}}:"


def cell_prefix(name: str) -> str:
    """Return the key of a cell."""
    return f"stroma:cell:{quote(name, safe='')}"


# ---------------------------------------------------------------------- steps


class _StepHead(NamedTuple):
    """The first line of a stored step. ``key_bytes``: size of its input key, which is after the output."""

    node_id: str
    contract: str
    schema_ref: str
    sha256: str
    number: int | None
    key_bytes: int | None


def pack_step(node_id: str, step: Step) -> bytes:
    """Encode a committed output or an annotation."""
    contract, schema_ref, output, sha256, number, key = step
    head = [node_id, contract, schema_ref, sha256.hex(), number, None if key is None else len(key)]
    return b"".join((_compact(head).encode(), b"\n", output, key or b""))


def pack_discard(discard: Discard) -> str:
    """Encode the commits to discard for the script: first or -1, positions of failed items, places."""
    places = [f"{position}:{branch}" for position, branch in discard.places]
    return _compact([-1 if discard.first is None else max(discard.first, 0), discard.failed_at, places])


def read_step(value: bytes) -> tuple[str, Step]:
    """Return what :func:`pack_step` encoded; for damaged data, a step with a wrong checksum."""
    line, _, data = value.partition(b"\n")
    try:
        node_id, contract, schema_ref, sha256, number, key_bytes = decode_json(line, _StepHead, _A_RECORD)
        checksum = bytes.fromhex(sha256)
    except (CorruptCheckpoint, ValueError):
        return DAMAGED, Step("", "", value, b"")
    size = len(data) if key_bytes is None else max(0, len(data) - key_bytes)
    key = None if key_bytes is None else data[size:]
    return node_id, Step(contract, schema_ref, data[:size], checksum, number, key)


def step_row(run_id: str, place: str, value: bytes) -> StepRow:
    """Decode a row of committed outputs. Raises CorruptCheckpoint for a damaged place."""
    position, _, branch = place.partition(":")
    name = RecordName(run_id, "commit", place)
    return StepRow(decode_number(position, name), branch, *read_step(value))


def payloads_of(part: bytes, value: bytes) -> list[bytes]:
    """Return the payloads in a value of a hash of a run. ``part``: which hash."""
    step = read_step(value.partition(b"\n")[2] if part == b"saved" else value)[1]
    return [step.output] if step.input_key is None else [step.output, step.input_key]


# ---------------------------------------------------------------------- attempts


def pack_attempt(attempt: AttemptRecord) -> str:
    """Encode an attempt; the number of its commit and the size of its output, or 0, precede it."""
    return _compact(stored_values(attempt))


def read_attempts(
    run_id: str, items: Iterable[tuple[str, bytes]], places: Iterable[Any] = ()
) -> list[tuple[int, AttemptRecord]]:
    """Decode attempts by their keys, in the order of the history, each with the number of its commit.

    Records of failed items are left out: they are not attempts. An attempt whose output is not at one of
    these places, or was replaced there, has the number 0 and no size. Raises CorruptCheckpoint.
    """
    attempts: list[tuple[int, AttemptRecord]] = []
    newest = {as_text(place): 0.0 for place in places}
    for at, value in items:
        name = RecordName(run_id, "attempt", at)
        epoch = decode_number(at.partition(":")[0], name)
        order, _, rest = value.partition(b" ")
        size, _, fields = rest.partition(b" ")
        one = to_record(decode_json(fields, ATTEMPT_SHAPE, name), epoch, decode_number(size, name))
        attempts.append((number := decode_number(order, name), one))
        newest[place_of(one)] = max(number, newest.get(place_of(one), math.inf))
    attempts.sort(key=lambda pair: (pair[1].epoch, pair[1].key))
    for index, (number, one) in enumerate(attempts):
        if not number or newest[place_of(one)] != number:
            one.output_bytes, attempts[index] = None, (0, one)
    return [pair for pair in attempts if pair[1].outcome != COLLECTED]


def place_of(attempt: AttemptRecord) -> str:
    """Return the key of the output of an attempt among the outputs of its execution."""
    return f"{attempt.position}:{attempt.branch}"


# ---------------------------------------------------------------------- runs

_RUN_TYPES: Final = get_type_hints(RunRow)


def read_run_row(reply: Any, run_id: str) -> RunRow:
    """Return the row of a run. Raises an error in the reply, and CorruptCheckpoint for a damaged number."""
    if isinstance(reply, Exception):
        raise reply
    now_ms, fields = reply
    f = as_hash(fields)

    def read(name: str, kind: Any) -> Any:
        value = f.get(name)
        if value is None:
            return {int: 0, str: ""}.get(kind)
        is_text = kind in (str, str | None)
        return as_text(value) if is_text else decode_json(value, kind, RecordName(run_id, "field", name))

    values = {name: read(name, kind) for name, kind in _RUN_TYPES.items()}
    until, claim_until = read("until_ms", int | None), read("claim_until_ms", int)
    values["left_seconds"] = -1.0 if until is None else (until - now_ms) / 1000
    if claim_until < now_ms:
        values["claim"] = None
    run = RedisRun(run_id, read("token", str), values["epoch"], read("writes", int), read("changes", str))
    return RunRow(**{**values, "run": run, "run_id": run_id})


# ---------------------------------------------------------------------- replies


def as_hash(reply: Any) -> dict[str, bytes]:
    """Return a hash from a reply in either version of the protocol."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {as_text(key): value for key, value in items}


def info_lines(info: Any) -> list[str]:
    """Return the lines of a reply to INFO, which some drivers parse."""
    if isinstance(info, dict):
        return [f"{name}:{value}" for name, value in info.items()]
    return as_text(info).splitlines()


def as_text(value: Any) -> str:
    """Return a reply as text; bytes that are not UTF-8 are escaped."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
