"""Redaction in hooks, log lines and messages of one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from pydantic import BaseModel

from stroma._utils.access import kind_of, message_of
from stroma._utils.hiding import HIDDEN, without
from stroma._utils.logs import SafeLogger
from stroma._utils.secrets import Secrets, stand_in_of
from stroma._utils.text import typed
from stroma.checkpoint import StoreError
from stroma.contracts.contract import ContractViolation
from stroma.contracts.copying import PickledSnapshot
from stroma.contracts.schema import schema_of
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.trace.events import AttemptRow
from stroma.trace.redaction import (
    MAX_WORDS,
    forms_to_hide,
    hide_rejected,
    hide_state,
    hide_words,
    removed_values,
)
from stroma.trace.result import ExecutionResult
from stroma.trace.trace import ExecutionTrace

if TYPE_CHECKING:
    from stroma.contracts.schema import Schema
    from stroma.trace.rejected import RejectedOutput

_PLAIN_LEAVES: Final = frozenset({str, int, float, bool, type(None)})


def notes_of_error(error: BaseException) -> dict[str, Any]:
    """Return the notes of exporters on an exception; a redacted copy of it has the same notes."""
    notes: dict[str, Any] = error.__dict__.setdefault("_stroma_notes", {})
    return notes


@final
class Redactor:
    """Redacts with the function of the config, if there is one, and masks secrets of states in messages.

    A message is redacted once, where it is made; whatever stores, logs or exports it has it in this form.
    """

    __slots__ = ("_context", "_redact", "_secrets", "_seen", "_trace", "is_on")

    def __init__(
        self, redact: Callable[[dict[str, Any]], dict[str, Any]] | None, context: Any, trace: ExecutionTrace
    ) -> None:
        self._redact = redact
        #: The config has a function that redacts.
        self.is_on = redact is not None
        self._context = context
        self._trace = trace
        self._secrets: Secrets | None = None  # Most runs meet none.
        #: Values that are removed from the states that bodies of flows have seen.
        self._seen: set[str] = set()

    @property
    def secrets(self) -> Secrets:
        """The secrets that the run has met."""
        if self._secrets is None:
            self._secrets = Secrets()
        return self._secrets

    def redact_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state as hooks may see it."""
        if self._redact is None:
            return state
        # A value that redact removes from a state may still appear in a message.
        self.note_secrets(state)
        shown: dict[str, Any] = hide_state(self._redact, state)
        return shown

    def redact_message(self, text: str, states: Iterable[Any] = (), *, of_flow: bool = False) -> str:
        """Return a message without the values that ``redact`` removes from the states that it may quote.

        ``of_flow``: the body of a flow made it, which may quote all that it has seen.
        """
        if self._redact is None:
            return text
        try:
            return hide_words(self._redact, text, self._hidden(states, of_flow))
        except Exception:  # A class of the user's that cannot be shown.
            return HIDDEN

    def redact_question(self, text: str, states: Iterable[Any] = (), *, of_flow: bool = False) -> str:
        """Return the text of a question, in which ``redact`` can change what it does not raise for.

        A person has to read it: unlike a message, it is not hidden as a whole.
        """
        if self._redact is None:
            return text
        try:
            text = without(text, self._hidden(states, of_flow))
        except Exception:  # As above.
            return HIDDEN
        shown = hide_state(self._redact, {"message": text}).get("message")
        return shown if isinstance(shown, str) else text

    def redact_foreign(self, text: str) -> str:
        """Return the message of code around steps, which may quote anything: nothing of it is shown."""
        return text if self._redact is None else HIDDEN

    def _hidden(self, states: Iterable[Any], of_flow: bool) -> frozenset[str]:
        assert self._redact is not None
        words = removed_values(self._redact, states)
        return forms_to_hide(words | self._seen if of_flow else words)

    def note_seen(self, state: BaseModel | None) -> None:
        """Remember what ``redact`` removes from a state that the body of a flow sees."""
        if self._redact is not None and state is not None and len(self._seen) <= MAX_WORDS:
            try:
                self._seen |= removed_values(self._redact, [schema_of(type(state)).state(state)])
            except Exception:  # As above: every message of the body is hidden.
                self._seen.add("")

    def note_secrets(self, state: Any) -> None:
        """Remember the secrets in a state, to mask them in messages."""
        if type(state) is tuple and _PLAIN_LEAVES.issuperset(map(type, state)):
            return  # A flat state without secrets, as most are: a failed attempt takes a tenth less.
        self.secrets.note(state)

    def note_context(self) -> None:
        """Remember the secrets of the run's context."""
        if type(self._context) is not dict or self._context:  # Most runs have none: 2 us less.
            self.note_secrets(self._context)

    def note_attempt(self, snapshot: Any) -> None:
        """Remember the secrets in the input of an attempt, and in the context of the run."""
        if type(snapshot) is not PickledSnapshot and type(snapshot) is not bytes:  # Those hold plain data.
            self.note_secrets(snapshot)
        self.note_context()

    def note_run(self) -> None:
        """Remember the secrets in the states of the top-level attempts so far."""
        for row in self._trace.rows:
            if isinstance(row, AttemptRow):
                self.note_secrets((row.input, row.output))
            else:
                self.note_secrets((row.input_state, row.output_state))

    def error_text(
        self, error: BaseException, snapshot: Any = (), states: Iterable[Any] | None = None
    ) -> str:
        """Return an exception as ``Type: message`` without secrets of the run, its context and a state.

        ``states``: those that it may quote; None if it may quote any.
        """
        self.note_attempt(snapshot)
        self.secrets.note_error(error)
        message = self.mask(message_of(error))
        message = self.redact_foreign(message) if states is None else self.redact_message(message, states)
        return typed(kind_of(error), message)

    def mask_error(self, error: BaseException, values: Any = ()) -> BaseException:
        """Return an exception of the user's code for a log, without secrets of the run and some values.

        With a ``redact`` nothing of the message is shown: it may quote any state, and any other message.
        """
        if self._redact is not None and not isinstance_by_type(error, StoreError):
            return stand_in_of(error, HIDDEN)
        self.note_context()
        self.note_secrets(values)
        self.secrets.note_error(error)
        return self.secrets.mask_error(error)

    def hide_rejected(self, rejected: RejectedOutput) -> RejectedOutput:
        """Return a rejected output as ``redact`` lets it be seen."""
        return hide_rejected(self._redact, rejected)

    def mask(self, text: str) -> str:
        """Return a text without the secrets that this run has met."""
        return self.secrets.mask(text)

    def mask_failure(self, failure: Failure, snapshot: Any) -> Failure:
        """Return a failure whose message lacks the secrets of the run's context and the attempt's input."""
        self.note_attempt(snapshot)
        error = failure.exception
        self.secrets.note_error(error)
        if isinstance_by_type(error, ContractViolation) and isinstance(error.schema, type):
            # A validator of the user may quote the value of a field that is declared as a secret.
            self.secrets.note(error.raw, error.schema)
        message = self.mask(failure.message)
        return failure if message == failure.message else replace(failure, message=message)

    def redact_error(self, error: BaseException) -> BaseException:
        """Return an exception as hooks may see it: a violation has the state that broke the contract."""
        if self._redact is None or not isinstance_by_type(error, ContractViolation):
            return error
        try:
            errors = [
                {k: v for k, v in e.items() if k != "input"} if isinstance(e, dict) else e
                for e in error.errors
            ]
            redacted = ContractViolation(error.node_id, error.direction, self.redact_state(error.raw), errors)
            # Exporters that see both, in one hook and another, recognise them as one.
            redacted.__dict__["_stroma_notes"] = notes_of_error(error)
            return redacted
        except Exception:  # Code of the user made it, without some of its attributes.
            return ContractViolation("", "output", {"redacted": f"a {type(error).__name__}"}, [])

    def redact_result(self, result: ExecutionResult, *, with_states: bool) -> ExecutionResult:
        """Return a copy of a result for hooks, with states or without."""
        if not with_states:
            return self._copy(result, None, result.trace.copy(with_states=False))
        state, trace = result.final_state, result.trace.copy()
        if isinstance(state, BaseModel):
            schema = schema_of(type(state))
            state = schema.copy(state)
            if self._redact is not None:
                # What redact returns need not satisfy the schema.
                values = self.redact_state(schema.state(state))
                state = schema.construct({"root": values.get("root", values)} if schema.is_root else values)
        if self._redact is not None:
            for event in trace.walk():
                event.input_state = self.redact_state(event.input_state)
                if event.output_state is not None:
                    event.output_state = self.redact_state(event.output_state)
        return self._copy(result, state, trace)

    def _copy(
        self, result: ExecutionResult, state: BaseModel | None, trace: ExecutionTrace
    ) -> ExecutionResult:
        failure = result.failure
        if self._redact is not None and failure is not None:
            failure = replace(failure, exception=self.redact_error(failure.exception))
        return replace(
            result,
            final_state=state,
            trace=trace,
            failure=failure,
            hook_errors=list(result.hook_errors),
            unpriced_models=list(result.unpriced_models),
            suspended=list(result.suspended),
        )


@final
class UnreadState(dict[str, Any]):
    """An empty dict in place of a state. All sets of hooks that read no state share it.

    Attributes:
        model: the state itself, which nobody may change; only while the hook runs.
        schema: of that model.
        shapes: types and sizes of its fields as one exporter wrote them, for the others.
    """

    __slots__ = ("_has_noted", "_redactor", "_shown", "model", "schema", "shapes")

    def __init__(self, schema: Schema, model: BaseModel, redactor: Redactor) -> None:
        self.schema, self.model = schema, model
        self._redactor = redactor
        self._shown: dict[str, Any] | None = None
        self._has_noted = False
        self.shapes: str | None = None

    @property
    def is_redacted(self) -> bool:
        """True if the config has a ``redact``: only :meth:`shown` may then be sent."""
        return self._redactor.is_on

    def shown(self) -> dict[str, Any]:
        """Return the state as hooks see it that read it; made once for all of them."""
        if self._shown is None:
            self._shown = self._redactor.redact_state(self.schema.state(self.model))
        return self._shown

    def note_secrets(self) -> None:
        """Remember the secrets in the state, once, to mask them in exported data of the run."""
        if not self._has_noted:
            self._has_noted = True
            self._redactor.note_secrets(self.model)


class HookState(NamedTuple):
    """View of a state for hooks."""

    schema: Schema
    value: BaseModel
    redactor: Redactor

    def for_reader(self) -> dict[str, Any]:
        """Return a dict that the hooks of one set may change."""
        state = self.schema.state(self.value)
        return self.redactor.redact_state(state) if self.redactor.is_on else state

    def for_others(self) -> UnreadState:
        """Return what the sets that read no state share."""
        return UnreadState(self.schema, self.value, self.redactor)


class HookResult(NamedTuple):
    """View of a result for hooks."""

    value: ExecutionResult
    redactor: Redactor

    def for_reader(self) -> ExecutionResult:
        """Return a result that the hooks of one set may change."""
        return self.redactor.redact_result(self.value, with_states=True)

    def for_others(self) -> ExecutionResult:
        """Return what the sets that read no state share."""
        return self.redactor.redact_result(self.value, with_states=False)


logger = logging.getLogger("stroma")
logger.addHandler(logging.NullHandler())


class RunLogger(SafeLogger):
    """Adds the run id to every record; makes none without a handler: a record takes 15 us.

    Attributes:
        redactor: masks the secrets of the run; set by the context of the run.
    """

    def __init__(self, run_id: str, redactor: Redactor | None = None) -> None:
        super().__init__(logger, {"run_id": run_id})
        self._run_id = run_id
        self.redactor = redactor

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line about the run. The id is an argument: systems group lines by their template."""
        if args:
            text = f"run %r: {msg}"
        else:
            text = "run %r: " + str(msg).replace("%", "%%")
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        super().log(level, text, self._run_id, *args, **kwargs)

    def isEnabledFor(self, level: int) -> bool:
        return self.logger.isEnabledFor(level) and _has_handler(self.logger)

    def mask(self, text: str) -> str:
        return text if self.redactor is None else self.redactor.mask(text)

    def mask_error(self, error: BaseException) -> BaseException:
        return super().mask_error(error) if self.redactor is None else self.redactor.mask_error(error)


def _has_handler(logger: logging.Logger) -> bool:
    """Return True if a record would meet a handler, or a filter, that does anything."""
    ancestor: logging.Logger | None = logger
    while ancestor is not None:
        if ancestor.filters or set(map(type, ancestor.handlers)) - {logging.NullHandler}:
            return True
        ancestor = ancestor.parent if ancestor.propagate else None
    return False
