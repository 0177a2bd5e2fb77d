"""States of a store as plain data, and redaction of the messages of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from stroma._utils.hiding import HIDDEN, without
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint
from stroma.checkpoint.identity import place_before, sequence_id, with_outer
from stroma.contracts.schema import Schema
from stroma.trace.plain import jsonable
from stroma.trace.redaction import Redact, hidden_values, hide_state, hide_words

_MAX_STATE_BYTES: Final = 1_000_000
_NO_VALUES: Final[frozenset[str]] = frozenset()

#: The place of a state: (position, branch) of an output; None for the input of the run.
_Place = tuple[int, str] | None


class Payload(NamedTuple):
    """A state as plain JSON data, or the reason why there is none."""

    value: Any
    problem: str | None = None


def decode_payload(data: bytes, max_bytes: int | None) -> Payload:
    """Return a state in stored form as plain data, without its content above ``max_bytes``."""
    if max_bytes is not None and len(data) > max_bytes:
        return too_large(len(data))
    try:
        return Payload(jsonable(Schema.decode_raw(data)))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        return Payload(None, f"it cannot be read back: {type(error).__name__}: {error}")


def too_large(size: int) -> Payload:
    """Return the payload for a state that is too large to show."""
    return Payload(None, f"it has {size:,} bytes, too large to show here")


def redact_value(redact: Redact | None, value: Any) -> Any:
    """Return a redacted state; a note in its place if ``redact`` raises."""
    return value if redact is None else jsonable(hide_state(redact, value))


class MessageRedaction:
    """Removes from the messages of one run what ``redact`` removes from the states around them.

    These are the input of the run, and the outputs of the place, of its group, of the position before, and of
    what precedes the place in a sequence. If one of them cannot be read, it is unknown what is hidden in it,
    and no message is shown.
    """

    def __init__(self, store: AsyncStates, redact: Redact | None, run_id: str) -> None:
        self._store = store
        self._redact = redact
        self._run_id = run_id
        self._hidden: dict[_Place, frozenset[str] | None] = {}

    def message(self, text: str | None, position: int, branch: str) -> str | None:
        """Return a redacted message of an attempt at a place."""
        if self._redact is None or not text:
            return text
        hidden = self._hidden_around(position, branch)
        return HIDDEN if hidden is None else hide_words(self._redact, text, hidden)

    def code(self, text: str | None, position: int, branch: str) -> str | None:
        """Return a redacted code, such as a reason: parts that are not hidden stay as they are."""
        hidden = self._hidden_around(position, branch) if text and self._redact is not None else _NO_VALUES
        return HIDDEN if hidden is None else text and without(text, hidden)

    def _hidden_around(self, position: int, branch: str) -> frozenset[str] | None:
        """Return the values to hide in messages of a place; None if unknown."""
        hidden = _NO_VALUES
        places: list[_Place] = [None, (position - 1, ""), (position, ""), (position, branch)]
        places += self._before_in_sequences(position, branch)
        for place in dict.fromkeys(places):
            if place not in self._hidden:
                self._hidden[place] = self._hidden_in(place)
            values = self._hidden[place]
            if values is None:
                return None
            hidden |= values
        return hidden

    def _before_in_sequences(self, position: int, branch: str) -> Iterator[_Place]:
        """Yield the places whose outputs a place in a sequence, or what is around it, has as its input."""
        for inner in with_outer(branch):
            if "." not in inner:
                return  # A sequence is inside a map.
            attempts = self._store.attempts_at(self._run_id, position, inner)
            # A group that has not ended has no attempt: it may be in a sequence.
            before = place_before(inner, attempts[-1].group_id if attempts else sequence_id(()))
            if before is not None:
                yield position, before

    def _hidden_in(self, place: _Place) -> frozenset[str] | None:
        """Return the values that redaction removes from a state; None if unknown."""
        if place is not None and place[0] < 0:
            return _NO_VALUES
        try:
            if place is None:
                data: bytes | None = self._store.input_of(self._run_id)
            else:
                data = self._store.output_of(self._run_id, *place)
        except CheckpointNotFound:
            return _NO_VALUES  # The run was deleted meanwhile.
        except CorruptCheckpoint:
            return None
        if data is None:
            return _NO_VALUES
        state = decode_payload(data, _MAX_STATE_BYTES)
        if state.problem is not None:
            return None
        return hidden_values([(state.value, redact_value(self._redact, state.value))])
