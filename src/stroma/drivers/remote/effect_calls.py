"""Calls of effects by workers that may be lost: a call that may have happened is asked about, and not simply repeated."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from typing import Final

from stroma.checkpoint.entries import NOT_DONE
from stroma.drivers.remote.state import Driver, NodePlace, RunState, shortened
from stroma.drivers.remote.wire import ActivityRequest, Answer, EffectCall, Reply

__all__ = ["call_effect"]

#: Workers that may be lost one after the other in an attempt of an effect.
_MAX_LOSSES: Final = 5
_NOT_DONE: Final = NOT_DONE.decode()


async def call_effect(
    driver: Driver, state: RunState, place: NodePlace, request: ActivityRequest
) -> tuple[Reply, bool]:
    """Let a worker make one attempt of an effect, after the state has that a call may be made.

    A worker that is lost may have made it: another one asks how it ended. Returns the reply, and whether the run was
    cancelled meanwhile. Raises CancelledError.
    """
    effects, key, node_id = state["effects"], place.key, place.spec["id"]
    answer, losses = request["answer"], 0
    while True:
        call: EffectCall = {"node_id": node_id, "number": 0, "is_open": False, "cause": ""}
        if key in effects and effects[key]["node_id"] == node_id:
            call = effects[key]
        number = call["number"]
        if call["is_open"] and (answer is None or answer.get("effect", ["", 0])[1] != number):
            answer = _question(place, call)
        if not call["is_open"] or answer is None or answer["payload"] in (None, _NOT_DONE):
            effects[key] = {"node_id": node_id, "number": number + 1, "is_open": True, "cause": ""}
        request["effect"], request["answer"] = [number, call["is_open"]], answer
        reply, cancelled = await driver.ask(request)
        if "lost" not in reply:
            break
        effects[key]["cause"] = shortened(reply["lost"], state["room"])
        losses += 1
        if cancelled:
            raise asyncio.CancelledError
        if losses >= _MAX_LOSSES:
            return reply, cancelled
    if "effect" not in reply:  # No worker has begun it.
        effects[key] = call
    elif place.kind == "item" and "output" in reply:
        del effects[key]  # A map may have any number of items.
    else:
        number, is_open = reply["effect"]
        unknown = reply["waiting"].get("effect") if "waiting" in reply else None
        cause = "" if unknown is None else unknown[2]
        effects[key] = {"node_id": node_id, "number": number, "is_open": is_open, "cause": cause}
    return reply, cancelled


def _question(place: NodePlace, call: EffectCall) -> Answer:
    """Return the question how a call of an effect ended."""
    return {
        "position": place.position, "branch": place.branch, "node_id": call["node_id"], "reason": "effect",
        "schema_ref": "", "payload": None, "effect": ["", call["number"], call["cause"] or "the run ended during the call"],
    }  # fmt: skip
