"""RecordedRun: a run from a journal as data for a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from stroma.checkpoint import CheckpointNotFound, Committed
from stroma.checkpoint.history.redaction import redact_value
from stroma.checkpoint.records import PICO, AttemptRecord
from stroma.contracts.schema import Schema
from stroma.failures.classes import FailureClass
from stroma.trace.events import FAILED_ITEM
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact

_SCHEMA: Final = "stroma.recorded-run/1"


def _stored(value: Any) -> bytes:
    """Return a state in its stored form; its first characters name that form."""
    if isinstance(value, bytes):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


#: A state in its stored form (UTF-8 JSON), which is part of the JSON of a file.
Stored = Annotated[bytes, BeforeValidator(_stored), PlainSerializer(json.loads)]


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

    def as_record(self, position: int) -> AttemptRecord:
        """Return the attempt as a store would list it at a position."""
        fields = self.model_dump(exclude={"contract", "cost_usd", "duration_ms", "output", "position"})
        return AttemptRecord(
            position=position,
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
    """

    run_id: str
    pipeline: str
    status: str
    error: str | None
    input: Stored
    attempts: tuple[RecordedAttempt, ...]

    @classmethod
    def read(cls, store: Any, run_id: str, *, redact: Redact | None = None) -> RecordedRun:
        """Read a run from a journal store; blocking.

        ``redact``: see RunConfig; applied to every state. Messages were redacted when they were recorded.
        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint for a damaged output, StoreError.
        """
        record = store.get_run(run_id)
        if record is None:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this store; check the id, and the store")
        contracts = _contracts(store, run_id)
        attempts = _of_last_process(store.attempts(run_id))
        run = cls(
            run_id=run_id,
            pipeline=record.pipeline,
            status=str(record.status),
            error=record.error,
            input=store.input_of(run_id),
            attempts=tuple(RecordedAttempt.of(attempt, contracts) for attempt in attempts),
        )
        return run if redact is None else run.redacted(redact)

    def redacted(self, redact: Redact) -> RecordedRun:
        """Return the run without what ``redact`` removes from states."""

        def hidden(data: bytes | None) -> bytes | None:
            raw = None if data is None else jsonable(Schema.decode_raw(data))
            shown = redact_value(redact, raw)
            return data if data is None or shown == raw else json.dumps(shown).encode()

        attempts = [one.model_copy(update={"output": hidden(one.output)}) for one in self.attempts]
        return self.model_copy(update={"input": hidden(self.input), "attempts": tuple(attempts)})

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, schema "stroma.recorded-run/1"."""
        attempts = [one.model_dump(mode="json", exclude_defaults=True) for one in self.attempts]
        return {"schema": _SCHEMA, **self.model_dump(mode="json", exclude={"attempts"}), "attempts": attempts}

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
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
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


def _contracts(store: Any, run_id: str) -> dict[tuple[int, str], str]:
    """Return the schema fingerprint of each committed output."""

    def query(rows: Any) -> dict[tuple[int, str], str]:
        run = rows.find(run_id)
        steps = [] if run is None else rows.steps(run.run, run.execution)
        return {(row.position, row.branch): row.step.contract for row in steps}

    fingerprints: dict[tuple[int, str], str] = store.read(query, {})
    return {place: contract.partition(":")[0] for place, contract in fingerprints.items()}


def is_failed_item(one: RecordedAttempt) -> bool:
    """Return True if this is the record of a failed item of a map instead of an attempt."""
    return one.outcome == "collected" or one.contract == FAILED_ITEM
