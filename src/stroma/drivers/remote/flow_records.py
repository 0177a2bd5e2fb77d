"""The records of a flow on a remote driver: they are in the state of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel

from stroma.checkpoint import Committed, StepCall, Waiting
from stroma.checkpoint.entries import OF_FLOW
from stroma.checkpoint.payloads import BlobStore
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import Schema
from stroma.drivers.remote.questions import answer_of, waiting_of
from stroma.drivers.remote.results import no_room_error, read_value
from stroma.drivers.remote.state import FlowRecords, RunState
from stroma.drivers.remote.wire import LARGE, ClassName, Value, json_size
from stroma.trace.events import AttemptRow

__all__ = ["FlowValues", "StateSession"]

#: Bytes of the record of a step, its input and output apart.
_STEP: Final = 200


class FlowValues:
    """States of a flow in stored form. Large ones are in the store of payloads, under the hash of their content."""

    def __init__(self, payloads: BlobStore | None, state: RunState) -> None:
        self._payloads = payloads
        self._state = state

    def store(self, text: str, cls: ClassName, *, counts: bool) -> Value:
        """Return a text as a value. ``counts``: it stays in the state of the run. Raises StoreError."""
        size, store = json_size(text), self._payloads
        if size < LARGE and (not counts or size <= self._state["room"]):
            if counts:
                self._state["room"] -= size
            return {"text": text, "size": size, "cls": cls}
        if store is None:
            raise no_room_error(size, self._state["room"])
        data = text.encode()
        name = hashlib.sha256(data).hexdigest()
        store.put(name, data)
        return {"blob": name, "size": size, "cls": cls}

    def text_of(self, value: Value) -> str:
        return read_value(self._payloads, value)


class StateSession(NullSession):
    """The session of a flow whose records are in the state of the run."""

    stores_inputs = True

    def __init__(self, state: RunState, values: FlowValues, position: int) -> None:
        self._state = state
        self._values = values
        records: FlowRecords = state.setdefault("flow", {"notes": {}, "steps": {}, "questions": {}})
        self._records = records
        self.continued = bool(records["notes"] or records["steps"] or records["questions"])
        self.notes: Mapping[str, bytes] = {key: text.encode() for key, text in records["notes"].items()}
        self.restored: Mapping[tuple[int, str], Committed] = {
            (position, key.partition("|")[2]): self._committed(key, *step)
            for key, step in records["steps"].items()
            if key in state["done"]
        }
        self._waiting = {
            (one["position"], one["branch"]): waiting_of({**one, "payload": None})
            for one in records["questions"].values()
        }
        self.waiting: Mapping[tuple[int, str], Waiting] = self._waiting
        self.answers()
        #: The output of the flow itself.
        self.output: Value | None = None

    def _committed(
        self, key: str, node_id: str, kind: str, contract: str, input_key: str | None
    ) -> Committed:
        call = StepCall(OF_FLOW, None if input_key is None else input_key.encode())
        return Committed(node_id, self._values.text_of(self._state["done"][key]).encode(), contract, call)

    def begin_step(self, key: str, node: Node | Group, schema: Schema, input_key: bytes | None) -> None:
        """Record which call of a step is made, before its output is there."""
        text = None if input_key is None else input_key.decode()
        before = self._records["steps"].get(key)
        if before is not None and before[3] != text:  # Another call than that of an earlier process.
            for inside in [one for one in self._state["done"] if one == key or one.startswith(f"{key}.")]:
                del self._state["done"][inside]
        elif not isinstance(node, Group):
            self._state["done"].pop(key, None)
        self._state["room"] -= 0 if before is not None else json_size(text or "") + len(key) + _STEP
        kind = "group" if isinstance(node, Group) else "node"
        self._records["steps"][key] = [node.node_id, kind, schema.fingerprint, text]

    def forget_inside(self, key: str) -> None:
        """Delete what the state holds of the children of a group that has its output."""
        for states in (self._state["maps"], self._state["done"], self._state["effects"]):
            for inside in [one for one in states if one.startswith(f"{key}.")]:
                del states[inside]
        self._state["maps"].pop(key, None)

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        """Record the output of a flow."""
        assert schema is not None
        assert output is not None
        cls: ClassName = ["out", row.node_id, schema.fingerprint]
        value = self._values.store(schema.encode(output).decode(), cls, counts=True)
        if not row.branch:
            self.output = value
            return
        key = f"{row.position}|{row.branch}"
        input_key = None if call is None or call.input_key is None else call.input_key.decode()
        self._records["steps"][key] = [row.node_id, "node", schema.fingerprint, input_key]
        self._state["done"][key] = value

    def note(self, key: str, data: bytes | None) -> None:
        notes = self._records["notes"]
        before = notes.pop(key, None)
        if before is not None:
            self._state["room"] += json_size(before) + len(key)
        if data is not None:
            notes[key] = data.decode()
            self._state["room"] -= json_size(notes[key]) + len(key)

    def ask(self, waiting: Waiting) -> None:
        key = f"{waiting.position}|{waiting.branch}"
        self._records["questions"][key] = answer_of(waiting)
        self._waiting[waiting.position, waiting.branch] = waiting
        if waiting.payload is None:
            self._state["answers"].pop(key, None)
        else:  # It has expired, or was cancelled: an answer that comes later is refused.
            self._state["answers"][key] = answer_of(waiting)

    def answers(self) -> Mapping[tuple[int, str], Waiting]:
        for key, answer in self._state["answers"].items():
            if key in self._records["questions"]:
                place = (answer["position"], answer["branch"])
                self._waiting[place] = waiting_of(answer)
        return self._waiting
