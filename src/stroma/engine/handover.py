"""The state on its way from one node of a pipeline to the next."""

from __future__ import annotations

from typing import final

from pydantic import BaseModel

from stroma.contracts.schema import PickledSnapshot, Schema, Snapshot, schema_of

__all__ = ["Handover"]


@final
class Handover:
    """The last output that was committed at the top level.

    The values of a large state are passed on as they are: copies would take twice the time. From then on its
    snapshot replaces it.

    Attributes:
        is_active: outputs go from node to node, and not to plain code between them.
        model: the output itself.
        snapshot: of a large output; None for any other.
        is_moved: a node has values of the model in its input, and may change them.
    """

    __slots__ = ("is_active", "is_moved", "model", "snapshot")

    def __init__(self) -> None:
        self.is_active = False
        self.is_moved = False
        self.model: BaseModel | None = None
        self.snapshot: PickledSnapshot | bytes | None = None

    def offer(self, model: BaseModel, snapshot: Snapshot | None = None) -> None:
        """Take over an output that was committed, with its snapshot."""
        self.model = model
        self.is_moved = False
        self.snapshot = None
        if isinstance(snapshot, (PickledSnapshot, bytes)) and self.is_active:
            self.snapshot = snapshot

    def take(self, value: BaseModel, schema: Schema) -> tuple[BaseModel, Snapshot]:
        """Return the input of the next node, and its snapshot. Raises what validators raise."""
        if self.snapshot is None:
            return schema.prepare_input(value)
        value = self.own(value)
        state = schema.take_over(value) if value is self.model else None
        if state is None:
            return schema.prepare_input(value)
        self.is_moved = True
        schema.mark_shared(state)
        return state, self.snapshot if state is value else schema.snapshot(state)

    def own(self, state: BaseModel) -> BaseModel:
        """Return a state with values that no node can change."""
        if not self.is_moved or state is not self.model:
            return state
        assert self.snapshot is not None
        schema = schema_of(type(state))
        return schema.mark_exclusive(schema.restore(self.snapshot))

    def state(self) -> BaseModel | None:
        """Return the last output, with values that no node can change; None before the first."""
        if self.model is None or self.is_moved:
            return self.model and self.own(self.model)
        self.snapshot = None  # The caller may change the model.
        return self.model
