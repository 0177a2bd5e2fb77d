"""Data format of the Redis store."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from stroma.checkpoint.decoding import RecordName, decode_json, decode_number
from stroma.checkpoint.durable.integrity import parse_run
from stroma.checkpoint.durable.rows import Annotation, RunRow, Step, StepRow
from stroma.checkpoint.errors import CorruptCheckpoint

__all__ = [
    "EXECUTION_KEYS",
    "RUN_KEYS",
    "RedisRun",
    "annotation_row",
    "annotations_key",
    "as_hash",
    "as_text",
    "cell_prefix",
    "decode_tags",
    "from_hex",
    "info_lines",
    "node_of",
    "pack",
    "pack_step",
    "payloads_of",
    "prefix_of",
    "read_head",
    "read_run_row",
    "read_step",
    "step_row",
    "unpack",
]


def annotations_key(kind: int) -> str:
    """Return the key of the annotations of one kind, after the prefix of a run."""
    return "saved" if kind == Annotation.SAVED else f"annotations:{kind}"


#: The keys of a run, after its prefix, except the states from save(), which expire by themselves.
RUN_KEYS: Final = (
    "run",
    "inputs",
    "events",
    *map(annotations_key, sorted(set(Annotation) - {Annotation.SAVED})),
)
#: The keys of each of its executions; a colon and its number follow.
EXECUTION_KEYS: Final = ("steps", "nodes", "attempts", "failed", "identities")

_compact: Final = json.JSONEncoder(separators=(",", ":")).encode


class RedisRun:
    """The key of a run, with its version when it was read or last written.

    Attributes:
        version: the highest acknowledged version; if the server has a lower one, it has lost writes.
        parent: False if the run has no annotation PARENT.
        annotation_version: number of changes of its annotations when it was read; "" for none.
    """

    __slots__ = ("annotation_version", "epoch", "parent", "prefix", "run_id", "token", "version")

    def __init__(
        self,
        run_id: str,
        token: str,
        epoch: int,
        version: int,
        parent: bool = True,
        annotation_version: str = "",
    ) -> None:
        self.run_id = run_id
        self.prefix = prefix_of(run_id)
        self.token = token
        self.epoch = epoch
        self.version = version
        self.parent = parent
        self.annotation_version = annotation_version

    def __eq__(self, other: object) -> bool:
        """Return True for a key of the same run: not of another one of its id, before or after it was deleted."""
        return isinstance(other, RedisRun) and (other.run_id, other.token) == (self.run_id, self.token)

    def __hash__(self) -> int:
        return hash((self.run_id, self.token))


def prefix_of(run_id: str) -> str:
    """Return the prefix of a run's keys."""
    # Percent-encoded, so that the keys of two runs never overlap, and no id contains a brace.
    return f"stroma:{{{quote(run_id, safe='')}}}:"


def cell_prefix(name: str) -> str:
    """Return the key of a cell."""
    return f"stroma:cell:{quote(name, safe='')}"


def pack(header: list[Any], *parts: bytes) -> bytes:
    """Return a line of JSON followed by binary parts."""
    line = _compact([header, [len(part) for part in parts]])
    return b"".join((line.encode("ascii"), b"\n", *parts))


def unpack(value: bytes, shape: Any, name: RecordName) -> tuple[Any, list[bytes]]:
    """Return what :func:`pack` packed, with a header of this shape. Raises CorruptCheckpoint."""
    line, _, rest = value.partition(b"\n")
    header, lengths = decode_json(line, tuple[shape, list[int]], name)
    parts = []
    for length in lengths:
        parts.append(rest[:length])
        rest = rest[length:]
    if rest or [len(part) for part in parts] != lengths:
        raise name.damaged("it has another length")
    return header, parts


#: The name of a record whose reader reports its damage by its own name.
_A_STEP: Final = RecordName("", "step")


class StepHeader(NamedTuple):
    """The first line of a stored step, with the place of its attempt."""

    contract: str
    schema_ref: str
    sha256: str
    number: int | None
    has_input_key: bool
    epoch: int
    attempt: int
    started_ns: int


def pack_step(step: Step, epoch: int, attempt: int, started_ns: int) -> bytes:
    """Encode a committed output with the place of its attempt."""
    contract, schema_ref, output, sha256, number, input_key = step
    header = [contract, schema_ref, sha256.hex(), number, input_key is not None, epoch, attempt, started_ns]
    return pack(header, output, input_key or b"")


def read_step(value: bytes) -> tuple[Step, tuple[int, int, int] | None]:
    """Return a Step and (epoch, attempt, start) of its attempt. For damaged data: None, and a wrong checksum."""
    try:
        header, (output, input_key) = unpack(value, StepHeader, _A_STEP)
    except (CorruptCheckpoint, ValueError):
        return Step("", "", value, b""), None
    step = Step(
        header.contract,
        header.schema_ref,
        output,
        from_hex(header.sha256),
        header.number,
        input_key if header.has_input_key else None,
    )
    return step, header[5:]


def read_head(line: bytes) -> tuple[int, tuple[int, int, int] | None]:
    """Return the size of an output, and (epoch, attempt, start) of its attempt, from the first line of a step."""
    try:
        header, (size, _) = decode_json(line, tuple[StepHeader, tuple[int, int]], _A_STEP)
    except CorruptCheckpoint:
        return 0, None
    return size, header[5:]


def payloads_of(part: bytes, value: bytes) -> list[bytes]:
    """Return the payloads in a value of a hash of a run. ``part``: which hash."""
    if part == b"saved":
        value = value.partition(b"\n")[2]
    if part in (b"inputs", b"annotations"):
        try:
            parts = unpack(value, list, _A_STEP)[1]
        except CorruptCheckpoint:
            return []
        if part == b"inputs" or not parts:
            return parts
        value = parts[0]
    step = read_step(value)[0]
    return [step.output] if step.input_key is None else [step.output, step.input_key]


def step_row(run_id: str, place: str, node_id: str, value: bytes) -> StepRow:
    """Decode a row of committed outputs. Raises CorruptCheckpoint for a damaged place."""
    position, _, branch = place.partition(":")
    name = RecordName(run_id, "commit", place)
    return StepRow(decode_number(position, name), branch, node_id, read_step(value)[0])


def annotation_row(kind: int, branch: str, value: bytes) -> StepRow:
    """Decode an annotation; a damaged one has a wrong checksum."""
    try:
        (node_id,), (data,) = unpack(value, tuple[str], _A_STEP)
    except (CorruptCheckpoint, ValueError):
        node_id, data = "?", value
    return StepRow(kind, branch, node_id, read_step(data)[0])


def decode_tags(run_id: str, data: bytes | None) -> tuple[str, ...]:
    """Return the tags of a run. Raises CorruptCheckpoint."""
    return () if data is None else tuple(decode_json(data, list[str], RecordName(run_id, "tags")))


def _run_row(reply: list[Any], run_id: str) -> RunRow:
    """Return the row of a run; a damaged one, see parse_run(), if a field is missing or cannot be read."""
    now, fields, parent = reply
    f = as_hash(fields)
    number: dict[str, Any] = {name: _number(f.get(name, b"0")) for name in _NUMBERS}
    texts = {name: _text(f.get(name)) for name in ("pipeline", "status", "error", "owner", "token")}
    others = {name: f.get(name) for name in ("version", "token") if name not in f}
    others |= {} if isinstance(number["version"], int) else {"version": f["version"]}
    try:
        decode_tags(run_id, f.get("tags"))
    except CorruptCheckpoint:
        others["tags"] = f["tags"]
    until = _number(f["until_ms"]) if "until_ms" in f else None
    values = (
        RedisRun(
            run_id,
            str(texts["token"]),
            number["epoch"],
            number["version"],
            bool(parent),
            as_text(f.get("annotation_version", b"")),
        ),
        run_id if f.get("run_id") == run_id.encode() else f.get("run_id"),
        texts["pipeline"],
        number["execution"],
        texts["status"],
        texts["error"],
        number["started_ms"],
        number["updated_ms"],
        number["tokens"],
        number["cost_pico"],
        number["latency_ns"],
        texts["owner"],
        number["epoch"],
        -1.0 if until is None else (until - now) / 1000 if isinstance(until, int) else until,
        number["nodes"],
        number["attempts"],
        number["commits"],
        _number(f["wake_ms"]) if "wake_ms" in f else None,
        _number(f["expires_ms"]) if "expires_ms" in f else None,
        _signed(f["priority"]) if "priority" in f else None,
        _text(f.get("queue_key")),
        _text(f.get("flow_version", b"")),
        _text(f.get("blocked")),
        *(_number(f[name]) if name in f else None for name in ("blocked_since", "blocked_until")),
        _text(f.get("blocked_codes")),
        _text(f.get("claim")) if _has_time_left(f.get("claim_until"), now) else None,
    )
    return parse_run(values, run_id, others)


def read_run_row(reply: Any, run_id: str) -> RunRow:
    """Return the row of a run, a damaged one if its key holds another type. Raises any other error in the reply."""
    if not isinstance(reply, Exception):
        return _run_row(reply, run_id)
    if "WRONGTYPE" not in f"{type(reply).__name__}: {reply}":
        raise reply
    values = (
        RedisRun(run_id, "", 0, 0),
        run_id,
        "",
        0,
        None,
        None,
        *[0] * 5,
        None,
        0,
        -1.0,
        0,
        0,
        0,
        *[None] * 4,
        "",
        *[None] * 5,
    )
    return parse_run(values, run_id)


def _number(value: bytes) -> Any:
    """Return a number, or the unchanged value if it is not one."""
    return int(value) if value.isdigit() and len(value) < 20 else value


def _signed(value: bytes) -> Any:
    """Return a number, which may be negative, or the unchanged value if it is not one."""
    number = _number(value.removeprefix(b"-"))
    return value if not isinstance(number, int) else -number if value.startswith(b"-") else number


def _has_time_left(until_ms: bytes | None, now_ms: int) -> bool:
    until = None if until_ms is None else _number(until_ms)
    return isinstance(until, int) and until >= now_ms


def _text(value: bytes | None) -> Any:
    """Return a text, or the unchanged value if it is not one."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


_NUMBERS: Final = (
    "epoch",
    "version",
    "execution",
    "started_ms",
    "updated_ms",
    "tokens",
    "cost_pico",
    "latency_ns",
    "nodes",
    "attempts",
    "commits",
)


def as_hash(reply: Any) -> dict[str, bytes]:
    """Return a hash from a reply in either version of the protocol."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {as_text(key): value for key, value in items}


def info_lines(info: Any) -> list[str]:
    """Return the lines of a reply to INFO, which some drivers parse."""
    if isinstance(info, dict):
        return [f"{name}:{value}" for name, value in info.items()]
    return as_text(info).splitlines()


def node_of(value: bytes) -> str:
    """Return the node id in a value of ``nodes``."""
    return as_text(value.partition(b" ")[2])


def as_text(value: Any) -> str:
    """Return a reply as text; bytes that are not UTF-8 are escaped."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def from_hex(digits: Any) -> bytes:
    """Decode hexadecimal digits; b"" for anything else."""
    try:
        return bytes.fromhex(digits)
    except (ValueError, TypeError):
        return b""
