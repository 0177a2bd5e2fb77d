"""RecordedRun: what a journal has of a run, as data that can be kept in a file."""

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
from stroma.checkpoint.records import AttemptRecord
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
    """An attempt as it was recorded.

    Attributes:
        output: what was committed, in its stored form (UTF-8 JSON); None if nothing was.
        contract: the fingerprint of the schema that it was committed with.
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
        """The same, as a store would list it at a position."""
        return AttemptRecord(
            position, self.branch, self.node_id, self.attempt, 0, self.duration_ms, self.outcome, self.failure_class,
            self.message, self.reason, self.tokens, self.output_tokens, self.cost_usd, self.model, self.output,
            output_bytes=None if self.output is None else len(self.output), error_type=self.error_type,
        )  # fmt: skip

    def committed(self) -> Committed:
        assert self.output is not None
        return Committed(self.node_id, self.output, self.contract or "")


_ATTEMPT: Final = TypeAdapter(RecordedAttempt)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The last execution of a run: its input, and at each place the attempts of the process that was there last.

    Attributes:
        status: as the store has it: "RUNNING" or a RunStatus.
        error: why it stopped, in words.
        input: in its stored form (UTF-8 JSON).
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

        ``redact``: see RunConfig; applied to every state and every message, and no value that it takes out of a state stands
        in a message.
        Raises CheckpointNotFound if there is no such run, CorruptCheckpoint for a damaged output, StoreError.
        """
        record = store.get_run(run_id)
        if record is None:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this store; check the id, and the store")
        contracts = _contracts(store, run_id)
        found = [_attempt(attempt, contracts) for attempt in _of_last_process(store.attempts(run_id))]
        run = cls(run_id, record.pipeline, record.status, record.error, store.input_of(run_id), tuple(found))
        return run if redact is None else run.redacted(redact)

    def redacted(self, redact: Redact) -> RecordedRun:
        """The same without what ``redact`` takes out of states."""
        hide = History(None, redact).hide  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        seen: list[tuple[Any, Any]] = []

        def hidden(data: bytes) -> bytes:
            raw = jsonable(Schema.decode_raw(data))
            shown = hide(raw)
            seen.append((raw, shown))
            return data if shown == raw else json.dumps(shown).encode()

        given = hidden(self.input)
        outputs = [None if one.output is None else hidden(one.output) for one in self.attempts]
        values = hidden_values(seen)

        def told(message: str | None) -> str | None:
            return None if message is None else hide_words(redact, message, values)

        attempts = [
            replace(one, output=output, message=told(one.message))
            for one, output in zip(self.attempts, outputs, strict=True)
        ]
        return replace(self, input=given, error=told(self.error), attempts=tuple(attempts))

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, schema "stroma.recorded-run/1"."""
        attempts = []
        for one in self.attempts:
            told = {name: value for name, value in asdict(one).items() if value not in (None, "", 0)}
            if one.output is not None:
                told["output"] = json.loads(one.output)
            attempts.append({"position": one.position, **told})
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
        """Raises ValueError for what is no recorded run."""
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            raise ValueError(
                f"this is no recorded run of this release ({_SCHEMA}); record it anew with: stroma record"
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
                f"this recorded run is damaged: {why}; record it anew with: stroma record"
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecordedRun:
        """Read a file that :meth:`save` wrote. Raises ValueError for another one."""
        try:
            return cls.from_json(json.loads(Path(path).read_text("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write it down."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _attempt_in(data: Mapping[str, Any]) -> RecordedAttempt:
    """Raises ValidationError, TypeError."""
    told = {"branch": "", **data}
    output = _stored(told.pop("output")) if "output" in told else None
    # As JSON, since strictly only that is taken for a dataclass.
    return replace(_ATTEMPT.validate_json(json.dumps(told), strict=True), output=output)


def _stored(value: Any) -> bytes:
    """A state in its stored form: as the encoder writes it, since how it begins says which form that is."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _attempt(one: AttemptRecord, contracts: Mapping[tuple[int, str], str]) -> RecordedAttempt:
    contract = None if one.output is None else contracts.get((one.position, one.branch))
    return RecordedAttempt(
        one.position, one.branch, one.node_id, one.attempt, one.outcome, one.failure_class, one.message, one.error_type, one.reason,
        one.tokens, one.output_tokens, one.cost_usd, one.model, one.duration_ms, one.output, contract,
    )  # fmt: skip


def _of_last_process(attempts: list[AttemptRecord]) -> list[AttemptRecord]:
    """At each place, the attempts since the last first one: every process counts from 1."""
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for one in attempts:
        place = places.setdefault((one.position, one.branch), [])
        if one.attempt == 1:
            place.clear()
        place.append(one)
    return [one for place in places.values() for one in place]


def _contracts(store: Any, run_id: str) -> dict[tuple[int, str], str]:
    """The fingerprint of each committed output's schema."""
    if hasattr(store, "read"):

        def query(rows: Any) -> dict[tuple[int, str], str]:
            found = rows.find(run_id)
            steps = [] if found is None else rows.steps(found.run, found.execution)
            return {(row.position, row.branch): row.step.contract for row in steps}

        kept: dict[tuple[int, str], str] = store.read(query, {})
    else:
        kept = {}
        for key, (_, _, _, contract, _) in store._runs[run_id].entries():
            if not isinstance(key, str):
                kept[key if isinstance(key, tuple) else (key, "")] = contract
    return {place: contract.partition(":")[0] for place, contract in kept.items()}


def is_failed_item(one: RecordedAttempt) -> bool:
    """Whether it is no attempt, but the note that an item of a map has failed for good."""
    return one.outcome == "collected" or one.contract == FAILED_ITEM
