"""Models of the OpenAI Agents SDK whose requests are steps."""

from __future__ import annotations

from typing import Any

from agents import Model, ModelProvider, MultiProvider
from agents.exceptions import (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)

from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control
from stroma.adapters.guard import Guard
from stroma.cost.usage import Usage, usage_from

__all__ = ["GuardedModel", "GuardedProvider", "control"]


class GuardedModel(Model):
    """A model whose requests are steps: ``Agent(model=GuardedModel(model, guard))``."""

    def __init__(self, model: Model, guard: Guard) -> None:
        self._model = model
        about: dict[str, Any] = {"given": _asked, "made": _answer, "usage": self._used, "control": control}
        self._get = guard.wrap("model", model.get_response, kind="acall", **about)
        self._stream = guard.wrap("model", model.stream_response, kind="astream", collect=_last, **about)

    def _used(self, response: Any) -> Usage | None:
        if getattr(response, "usage", None) is None:
            return None
        name = getattr(response, "model", None) or getattr(self._model, "model", None)
        return usage_from(response.usage, model=name if isinstance(name, str) else None)

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        return await self._get(*args, **kwargs)

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        return self._stream(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        # All else is the model's own, what the base class has a default for too.
        if name.startswith("_") or name in ("get_response", "stream_response"):
            return super().__getattribute__(name)
        return getattr(self._model, name)


class GuardedProvider(ModelProvider):
    """Guards the models that a provider finds by their names: ``RunConfig(model_provider=GuardedProvider(guard))``."""

    def __init__(self, guard: Guard, provider: ModelProvider | None = None) -> None:
        self._guard, self._provider = guard, provider or MultiProvider()

    def get_model(self, model_name: str | None) -> Model:
        model = self._provider.get_model(model_name)
        return model if isinstance(model, GuardedModel) else GuardedModel(model, self._guard)

    async def aclose(self) -> None:
        await self._provider.aclose()


def control(error: BaseException) -> Control | None:
    """A guardrail that trips ends the run of an agent, and nothing is tried again."""
    return Control("passed") if isinstance(error, _TRIPWIRES) else None


_TRIPWIRES = (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[1] if len(args) > 1 else kwargs.get("input"))


def _answer(response: Any) -> dict[str, Any]:
    return {"output": getattr(response, "output", None)}


def _last(events: list[Any]) -> Any:
    """The response that the events of a stream end with; it has the usage."""
    return next((event.response for event in reversed(events) if hasattr(event, "response")), None)
