"""What leaves of states and messages: secrets in no mode, whatever has become of the states that held them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import ReliabilityContext, execute_step


class Inner(BaseModel, extra="allow"):
    key: SecretStr = SecretStr("inner-value")


class State(BaseModel):
    text: SecretStr = SecretStr("text-value")
    data: SecretBytes = SecretBytes(b"bytes-value\xff")
    any: Secret[str] = Secret("any-value")
    inner: Inner = Inner(more=SecretStr("extra-value"))  # type: ignore[call-arg]
    items: list[Any] = [{"key": (SecretStr("item-value"),)}, Secret(["list-value"])]


SECRETS = ("text", "bytes", "any", "inner", "extra", "item", "list")


def hides(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "message" else "..." for name, value in state.items()}


def fails(state: dict[str, Any]) -> dict[str, Any]:
    if "message" in state:
        return state
    raise ValueError("no")


@pytest.mark.core
@pytest.mark.parametrize("redact", [None, hides, fails])
@pytest.mark.parametrize("step", [False, True])
async def test_a_message_says_no_secret(redact: Any, step: bool) -> None:
    """Whatever type a secret has and wherever in the state it is, also where redact takes it out of the state: a
    message that names it is sent without."""
    seen = Seen()
    runner = quick(seen.hooks(content="redacted"), retries=0, redact=redact)

    @runner.node("node", input=State, output=State)
    async def node(state: State) -> State:
        raise ValueError(
            " ".join(f"{name}-value" for name in SECRETS) + f" {state.data.get_secret_value()!r}"
        )

    if step:
        ctx = ReliabilityContext.for_run(runner.config, runner.registry, runner.checkpoint_manager)
        await execute_step("node", node, State(), ctx)
    else:
        await runner.run([node], State())
    text = seen.span("stroma.node node").status.description
    assert text.split() == ["**********"] * len(SECRETS) + ["b'**********'"]
    assert "-value" not in str([span.to_json() for span in seen.spans])


@pytest.mark.core
async def test_a_state_that_cannot_be_written_out() -> None:
    """A number that is too long for text costs the span its input, and nothing else: the run is linked to all the same."""

    class Huge(BaseModel):
        n: Any = 0

    seen = Seen()
    hooks = seen.hooks(content="redacted")
    runner = quick(hooks, retries=0)

    @runner.node("node", input=Huge, output=Huge)
    async def node(state: Huge) -> Huge:
        return state

    await runner.run([node], Huge(n=10**5000))
    assert hooks.errors == {}
    assert seen.span("stroma.node node").attributes["input.value"] == "[unreadable: ValueError]"
