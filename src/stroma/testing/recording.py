"""RecordedRun: a run from a journal as data for a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError

from stroma.checkpoint import CheckpointNotFound, Committed
from stroma.checkpoint.history import History
from stroma.checkpoint.records import PICO, AttemptRecord
from stroma.contracts.schema import Schema
from stroma.failures.classes import FailureClass
from stroma.trace.events import FAILED_ITEM
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact, hidden_values, hide_words

__all__ = ["RecordedAttempt", "RecordedRun"]

_CLASSES: Final = f"^({'|'.join(FailureClass)})$"
_SCHEMA: Final = "stroma.recorded-run/1"


@dataclass(frozen=True, slots=True)
class RecordedAttempt:
    """A recorded attempt.

    Attributes:
        output: the committed output in its stored form (UTF-8 JSON); None without a commit.
        contract: fingerprint of the schema that it was committed with.
    """

    position: int
    branch: str
    node_id: str
    attempt: int
    outcome: str
    failure_class: Annotated[str | None, Field(pattern=_CLASSES)] = None
    message: str | None = None
    error_type: str | None = None
    reason: str | None = None
    tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    model: str | None = None
    duration_ms: float = 0.0
    output: bytes | None = None
    contract: str | None = None

    def as_record(self, position: int) -> AttemptRecord:
        """Return the attempt as a store would list it at a position."""
        return AttemptRecord(
            position=position,
            started_ns=0,
            branch=self.branch,
            attempt=self.attempt,
            node_id=self.node_id,
            duration_ns=round(self.duration_ms * 1e6),
            outcome=self.outcome,
            failure_class=self.failure_class,
            message=self.message,
            reason=self.reason,
            tokens=self.tokens,
            output_tokens=self.output_tokens,
            cost_pico=round(self.cost_usd * PICO),
            model=self.model,
            error_type=self.error_type,
            output_bytes=None if self.output is None else len(self.output),
            output=self.output,
        )

    def committed(self) -> Committed:
        assert self.output is not None
        return Committed(self.node_id, self.output, self.contract or "")


_ATTEMPT: Final = TypeAdapter(RecordedAttempt)


@dataclass(frozen=True, slots=True)
class RecordedRun:
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
    input: bytes
    attempts: tuple[RecordedAttempt, ...]

    @classmethod
    def read(cls, store: Any, run_id: str, *, redact: Redact | None = None) -> RecordedRun:
        """Read a run from a journal store; blocking.

        ``redact``: see RunConfig; applied to every state and every message. A value that it removes from a
        state is removed from messages, too. Raises CheckpointNotFound if there is no such run,
        CorruptCheckpoint for a damaged output, StoreError.
        """
        record = store.get_run(run_id)
        if record is None:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this store; check the id, and the store")
        contracts = _contracts(store, run_id)
        attempts = [_attempt(attempt, contracts) for attempt in _of_last_process(store.attempts(run_id))]
        run = cls(
            run_id, record.pipeline, record.status, record.error, store.input_of(run_id), tuple(attempts)
        )
        return run if redact is None else run.redacted(redact)

    def redacted(self, redact: Redact) -> RecordedRun:
        """Return the run without what ``redact`` removes from states."""
        hide = History(None, redact).redact_state  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        pairs: list[tuple[Any, Any]] = []

        def hidden(data: bytes) -> bytes:
            raw = jsonable(Schema.decode_raw(data))
            redacted_state = hide(raw)
            pairs.append((raw, redacted_state))
            return data if redacted_state == raw else json.dumps(redacted_state).encode()

        redacted_input = hidden(self.input)
        outputs = [None if one.output is None else hidden(one.output) for one in self.attempts]
        values = hidden_values(pairs)

        def fields(message: str | None) -> str | None:
            return None if message is None else hide_words(redact, message, values)

        attempts = [
            replace(one, output=output, message=fields(one.message))
            for one, output in zip(self.attempts, outputs, strict=True)
        ]
        return replace(self, input=redacted_input, error=fields(self.error), attempts=tuple(attempts))

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, schema "stroma.recorded-run/1"."""
        attempts = []
        for one in self.attempts:
            fields = {name: value for name, value in asdict(one).items() if value not in (None, "", 0)}
            if one.output is not None:
                fields["output"] = json.loads(one.output)
            attempts.append({"position": one.position, **fields})
        return {
            "schema": _SCHEMA,
            "run_id": self.run_id,
            "pipeline": self.pipeline,
            "status": self.status,
            "error": self.error,
            "input": json.loads(self.input),
            "attempts": attempts,
        }

    @classmethod
    def from_json(cls, data: Any) -> RecordedRun:
        """Parse the data of :meth:`to_json`. Raises ValueError if it is invalid."""
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            raise ValueError(
                f"not a recorded run of this release ({_SCHEMA}); record it again with: stroma record"
            )
        try:
            attempts = [_attempt_in(one) for one in data["attempts"]]
            return cls(
                data["run_id"],
                data["pipeline"],
                data["status"],
                data["error"],
                _stored(data["input"]),
                tuple(attempts),
            )
        except (KeyError, TypeError, ValidationError) as error:
            why: object = error
            if isinstance(error, ValidationError):
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


def _attempt_in(data: Mapping[str, Any]) -> RecordedAttempt:
    """Parse an attempt. Raises ValidationError or TypeError."""
    fields = {"branch": "", **data}
    output = _stored(fields.pop("output")) if "output" in fields else None
    # As JSON, since strictly only that is taken for a dataclass.
    return replace(_ATTEMPT.validate_json(json.dumps(fields), strict=True), output=output)


def _stored(value: Any) -> bytes:
    """Return a state in its stored form; its first characters name that form."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _attempt(one: AttemptRecord, contracts: Mapping[tuple[int, str], str]) -> RecordedAttempt:
    contract = None if one.output is None else contracts.get((one.position, one.branch))
    return RecordedAttempt(
        one.position,
        one.branch,
        one.node_id,
        one.attempt,
        one.outcome,
        one.failure_class,
        one.message,
        one.error_type,
        one.reason,
        one.tokens,
        one.output_tokens,
        one.cost_usd,
        one.model,
        one.duration_ms,
        one.output,
        contract,
    )


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
