"""Data format of the Redis store."""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import quote

from stroma.checkpoint.durable.integrity import parse_run
from stroma.checkpoint.durable.rows import Annotation, RunRow, Step, StepRow

__all__ = [
    "EXECUTION_KEYS",
    "RUN_KEYS",
    "RedisRun",
    "annotations_key",
    "as_hash",
    "as_text",
    "cell_prefix",
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
RUN_KEYS: Final = ("run", "inputs", *map(annotations_key, sorted(set(Annotation) - {Annotation.SAVED})))
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


def unpack(value: bytes) -> tuple[list[Any] | None, list[bytes]]:
    """Return what :func:`pack` packed; (None, []) for data in another format."""
    line, _, rest = value.partition(b"\n")
    try:
        header, lengths = json.loads(line)
        parts = []
        for length in lengths:
            parts.append(rest[:length])
            rest = rest[length:]
    except (ValueError, TypeError):
        return None, []
    return (header, parts) if isinstance(header, list) and header and not rest else (None, [])


def pack_step(step: Step, epoch: int, attempt: int, started_ns: int) -> bytes:
    """Encode a committed output with the place of its attempt."""
    contract, schema_ref, output, sha256, number, input_key = step
    header = [contract, schema_ref, sha256.hex(), number, input_key is not None, epoch, attempt, started_ns]
    return pack(header, output, input_key or b"")


def read_step(value: bytes) -> tuple[Step, list[Any] | None]:
    """Return a Step and [epoch, attempt, start] of its attempt. For damaged data: None, and a wrong checksum."""
    header, parts = unpack(value)
    if header is None or len(header) != 8 or len(parts) != 2:
        return Step("", "", value, b""), None
    contract, schema_ref, sha256, number, has_input_key, *attempt = header
    input_key = parts[1] if has_input_key else None
    return Step(contract, schema_ref, parts[0], from_hex(sha256), number, input_key), attempt


def read_head(line: bytes) -> tuple[int, list[Any] | None]:
    """Return the size of an output, and [epoch, attempt, start] of its attempt, from the first line of a step."""
    try:
        header, lengths = json.loads(line)
        return int(lengths[0]), header[5:] if len(header) == 8 else None
    except (ValueError, TypeError, LookupError):
        return 0, None


def payloads_of(part: bytes, value: bytes) -> list[bytes]:
    """Return the payloads in a value of a hash of a run. ``part``: which hash."""
    if part == b"saved":
        value = value.partition(b"\n")[2]
    if part in (b"inputs", b"annotations"):
        parts = unpack(value)[1]
        if part == b"inputs" or not parts:
            return parts
        value = parts[0]
    step = read_step(value)[0]
    return [step.output] if step.input_key is None else [step.output, step.input_key]


def step_row(place: str, node_id: str, value: bytes) -> StepRow:
    """Decode a row of committed outputs."""
    position, _, branch = place.partition(":")
    return StepRow(int(position), branch, node_id, read_step(value)[0])


def _run_row(reply: list[Any], run_id: str) -> RunRow:
    """Return the row of a run; a damaged one, see parse_run(), if a field is missing or cannot be read."""
    now, fields, parent = reply
    f = as_hash(fields)
    number: dict[str, Any] = {name: _number(f.get(name, b"0")) for name in _NUMBERS}
    texts = {name: _text(f.get(name)) for name in ("pipeline", "status", "error", "owner", "token")}
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
        _text(f.get("claim")) if _has_time_left(f.get("claim_until"), now) else None,
    )
    return parse_run(values, run_id)


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
        None,
        None,
        None,
    )
    return parse_run(values, run_id)


def _number(value: bytes) -> Any:
    """Return a number, or the unchanged value if it is not one."""
    return int(value) if value.isdigit() and len(value) < 20 else value


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
    "epoch", "version", "execution", "started_ms", "updated_ms", "tokens", "cost_pico", "latency_ns", "nodes", "attempts", "commits",
)  # fmt: skip


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
