"""Questions that a framework asks in a run of a guard, and no step: they stand in the journal, and so do their answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.node import held_by
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Place
from stroma.engine.questions import announce, make_question

__all__ = ["Questions"]

#: Beginning of the branch at which a question of a framework stands in the journal.
_ASKS: Final = "asked:"


class Questions:
    """The questions of a run, by the framework's ids.

    Attributes:
        taken: ids of the questions whose answers the framework has got: what asks again is a new question.
    """

    def __init__(self, ctx: ReliabilityContext) -> None:
        self._ctx = ctx
        self.taken: set[str] = set()

    @property
    def answers_of_steps(self) -> list[tuple[str, Any]]:
        """The stored answers to what steps of the run wait for, with the ids of these steps (``stroma approve``)."""
        session = self._ctx.session
        return [
            (waiting.node_id, _payload_of(waiting))
            for place, waiting in session.waiting.items()
            if waiting.payload is not None
            and waiting.effect is None
            and place not in session.restored
            and not waiting.branch.startswith(_ASKS)
        ]

    async def ask(self, node_id: str, key: str, reason: str) -> None:
        """Suspend the run with a question. ``key``: the framework's id of the question.

        An answer that was stored and not taken stays. Without a journal the framework alone can be answered.
        """
        ctx, place = self._ctx, _place_of(key)
        stored = ctx.session.waiting.get(place)
        if type(ctx.session).ask is NullSession.ask or (  # A store without a journal.
            stored is not None and stored.payload is not None and key not in self.taken
        ):
            ctx.note_suspended(reason)
            return
        question = make_question(ctx.session, Place(*place), node_id, ctx.redactor.mask(reason), None)
        ctx.note_question(question)
        pending = ctx.session.ask(question)
        if not isinstance(pending, Waiting):
            await pending
        if stored is None or stored.number != question.number:
            await announce(ctx, question)

    def answers_to(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the stored answers to questions, by their keys. The caller adds to ``taken`` what it uses."""
        questions = {key: self._ctx.session.waiting.get(_place_of(key)) for key in keys}
        return {
            key: _payload_of(waiting)
            for key, waiting in questions.items()
            if waiting is not None and waiting.payload is not None
        }


def _payload_of(waiting: Waiting) -> Any:
    assert waiting.payload is not None
    return held_by(schema_of(UntypedState).decode(waiting.payload))


def _place_of(key: str) -> tuple[int, str]:
    return 0, _ASKS + key
