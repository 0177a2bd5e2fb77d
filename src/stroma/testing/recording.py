"""RecordedRun: a run from a journal as data for a file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from stroma._utils.models import complaints_of
from stroma.checkpoint import CheckpointNotFound, Committed
from stroma.checkpoint.durable.rows import StepRow
from stroma.checkpoint.entries import OF_FLOW
from stroma.checkpoint.flow_notes import MessageNote, decode_flow_note
from stroma.checkpoint.history.redaction import redact_value
from stroma.checkpoint.records import PICO, AttemptRecord
from stroma.contracts.codec import decode_raw
from stroma.failures.classes import FailureClass
from stroma.trace.events import FAILED_ITEM
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact

_SCHEMA: Final = "stroma.recorded-run/1"
#: Kinds of notes about events: their times, messages, and the calls for which a run was suspended.
_REPEATED: Final = ("e", "m", "n", "v")


def _stored(value: Any) -> bytes:
    """Return a state in its stored form; its first characters name that form."""
    if isinstance(value, bytes):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _plain(data: str | bytes) -> Any:
    """Return a state in its stored form as plain JSON data, with masks in place of secrets."""
    return json.loads(data, object_hook=lambda value: _MASKS.get(next(iter(value), ""), value))


#: Masks of the stored forms of SecretStr and SecretBytes: a file is not encrypted.
_MASKS: Final = {"$ss": {"$ss": "*" * 10}, "$sb": {"$sb": base64.b64encode(b"*" * 10).decode()}}
#: A state in its stored form (UTF-8 JSON), which is part of the JSON of a file.
Stored = Annotated[bytes, BeforeValidator(_stored), PlainSerializer(_plain)]


class _Recorded(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class RecordedAttempt(_Recorded):
    """A recorded attempt.

    Attributes:
        output: the committed output; None without a commit.
        contract: fingerprint of the schema that it was committed with.
    """

    position: int
    branch: str = ""
    node_id: str
    attempt: int
    outcome: str
    failure_class: str | None = Field(None, pattern=f"^({'|'.join(FailureClass)})$")
    message: str | None = None
    error_type: str | None = None
    reason: str | None = None
    tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    model: str | None = None
    duration_ms: float = 0.0
    output: Stored | None = None
    contract: str | None = None

    @classmethod
    def of(cls, one: AttemptRecord, contracts: Mapping[tuple[int, str], str]) -> RecordedAttempt:
        """Return an attempt as a store lists it; ``contracts``: fingerprints by position and branch."""
        fields = {name: getattr(one, name) for name in cls.model_fields if name != "contract"}
        contract = None if one.output is None else contracts.get((one.position, one.branch))
        return cls(**fields, contract=contract)

    def as_record(self, position: int, branch: str) -> AttemptRecord:
        """Return the attempt as a store would list it at a place."""
        fields = self.model_dump(
            exclude={"branch", "contract", "cost_usd", "duration_ms", "output", "position"}
        )
        return AttemptRecord(
            position=position,
            branch=branch,
            started_ns=0,
            duration_ns=round(self.duration_ms * 1e6),
            cost_pico=round(self.cost_usd * PICO),
            output_bytes=None if self.output is None else len(self.output),
            output=self.output,
            **fields,
        )

    def committed(self) -> Committed:
        assert self.output is not None
        return Committed(self.node_id, self.output, self.contract or "")


class RecordedRun(_Recorded):
    """The latest execution of a run: its input, and the attempts of the latest process at each position.

    Attributes:
        status: status in the store: "RUNNING" or a RunStatus.
        error: message of the failure that stopped it.
        input: input in its stored form (UTF-8 JSON).
        events: events that the bodies of its flows got, and what else a resume repeats, as the notes of
            ``checkpoint.flow_notes`` by their keys.
        answers: answers to questions of flows, in stored form, by "position:branch".
        version: version of the pipeline that the run started with; None without one.
    """

    run_id: str
    pipeline: str
    status: str
    error: str | None
    input: Stored
    attempts: tuple[RecordedAttempt, ...]
    events: dict[str, Any] = {}
    answers: dict[str, Stored] = {}
    version: str | None = None

    @classmethod
    def read(cls, store: Any, run_id: str, *, redact: Redact | None = None) -> RecordedRun:
        """Read a run from a journal store; blocking.

        ``redact``: see RunConfig; applied to every state. Messages were redacted when they were recorded.
        Raises CheckpointNotFound for an unknown run, CorruptCheckpoint for a damaged output, StoreError.
        """
        record = store.get_run(run_id)
        if record is None:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this store; check the id, and the store")
        steps = _steps(store, run_id)
        # Without the id of the group around it.
        contracts = {(row.position, row.branch): row.step.contract.partition(":")[0] for row in steps}
        attempts = _of_last_process(store.attempts(run_id))
        events = _events(run_id, store.flow_notes(run_id), steps)
        ended = {(key.partition(":")[0], value[0]) for key, value in events.items() if ":e:" in key}
        run = cls(
            run_id=run_id,
            pipeline=record.pipeline,
            status=str(record.status),
            error=record.error,
            input=store.input_of(run_id),
            attempts=tuple(RecordedAttempt.of(attempt, contracts) for attempt in attempts),
            events=events,
            answers={
                f"{one.position}:{one.branch}": one.payload
                for one in store.waiting(run_id)
                if one.effect is None and (str(one.position), one.branch) in ended
            },
            version=record.version,
        )
        return run if redact is None else run.redacted(redact)

    def redacted(self, redact: Redact) -> RecordedRun:
        """Return the run without what ``redact`` removes from states."""

        def hidden(data: bytes | None) -> bytes | None:
            raw = None if data is None else jsonable(decode_raw(data))
            shown = redact_value(redact, raw)
            return data if data is None or shown == raw else json.dumps(shown).encode()

        attempts = [one.model_copy(update={"output": hidden(one.output)}) for one in self.attempts]
        answers = {place: hidden(answer) for place, answer in self.answers.items()}
        events = dict(self.events)
        for key, fields in self.events.items():
            if ":m:" in key:
                message = MessageNote(*fields)
                payload = hidden(message.payload.encode()) or b""
                events[key] = list(message._replace(payload=payload.decode()))
        changed = {"input": hidden(self.input), "answers": answers, "events": events}
        return self.model_copy(update={**changed, "attempts": tuple(attempts)})

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, schema "stroma.recorded-run/1", with masks in place of secrets."""
        attempts = [one.model_dump(mode="json", exclude_defaults=True) for one in self.attempts]
        data = {"schema": _SCHEMA, **self.model_dump(mode="json", exclude={"attempts"}), "attempts": attempts}
        for key, fields in self.events.items():
            if ":m:" in key and not (message := MessageNote(*fields)).payload.startswith(" "):
                payload = _stored(_plain(message.payload)).decode()
                data["events"][key] = list(message._replace(payload=payload))
        return data

    @classmethod
    def from_json(cls, data: Any) -> RecordedRun:
        """Parse the data of :meth:`to_json`. Raises ValueError if it is invalid."""
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            raise ValueError(
                f"not a recorded run of this release ({_SCHEMA}); record it again with: stroma record"
            )
        try:
            return cls.model_validate_json(json.dumps({k: v for k, v in data.items() if k != "schema"}))
        except ValidationError as error:
            why = ": ".join(complaints_of(error)[0])
            raise ValueError(
                f"recorded run is damaged: {why}; record it again with: stroma record"
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecordedRun:
        """Read a file of :meth:`save`. Raises ValueError for any other file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the run to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _of_last_process(attempts: list[AttemptRecord]) -> list[AttemptRecord]:
    """Return the attempts at each position since the latest first one: each process counts from 1."""
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for one in attempts:
        place = places.setdefault((one.position, one.branch), [])
        if one.attempt == 1:
            place.clear()
        place.append(one)
    return [one for place in places.values() for one in place]


def _steps(store: Any, run_id: str) -> list[StepRow]:
    def query(rows: Any) -> list[StepRow]:
        run = rows.find(run_id)
        return [] if run is None else list(rows.steps(run.run, run.execution))

    steps: list[StepRow] = store.read(query, [])
    return steps


def _events(run_id: str, notes: Mapping[str, bytes], steps: Iterable[StepRow]) -> dict[str, Any]:
    """Return the events of flows. The ends of steps have no content: their attempts are replayed."""
    events: dict[str, Any] = {}
    discarded: dict[str, list[tuple[int, int]]] = {}
    for key, data in notes.items():
        position, kind, branch = [*key.split(":", 2), "", ""][:3]
        if kind == "seed":
            events[key] = data.hex()
        elif kind in _REPEATED:
            events[key] = json.loads(data)
        elif kind == "d":
            discarded[position] = decode_flow_note(run_id, key, kind, data)
        elif kind == "f":
            events[f"{position}:e:{decode_flow_note(run_id, key, kind, data).event}"] = [branch, 0, ""]
    for row in steps:
        number = OF_FLOW - (row.step.number or 0)
        ranges = discarded.get(str(row.position), ())
        if number > 0 and not any(first <= number <= last for first, last in ranges):
            events[f"{row.position}:e:{number}"] = [row.branch, 0, ""]
    return events


def is_failed_item(one: RecordedAttempt) -> bool:
    """Return True if this is an item of a map that failed without a call."""
    return one.contract == FAILED_ITEM
