"""States for hooks that read none: an empty dict, and a way for exporters to look into the state without a copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from pydantic import BaseModel

if TYPE_CHECKING:
    from stroma.contracts.schema import Schema
    from stroma.engine.redaction import Redactor

__all__ = ["UnreadState"]


@final
class UnreadState(dict[str, Any]):
    """An empty dict in place of a state. All sets of hooks that read no state share it.

    Attributes:
        model: the state itself, which nobody may change; only while the hook runs.
        schema: of that model.
        shapes: what an exporter has written of the types and sizes of its fields, for the others.
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
        """Remember the secrets in the state, to mask them in what is sent of the run; done once."""
        if not self._has_noted:
            self._has_noted = True
            self._redactor.note_secrets(self.model)
