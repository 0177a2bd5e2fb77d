"""Names in OpenTelemetry: the conventions' release 0.1.0, with kinds and content for backends."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from tests.kit import computing
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import Pipeline, Usage
from stroma.telemetry import otel_hooks
from stroma.telemetry.inference import _PROVIDERS


class State(BaseModel):
    n: int = 0
    key: SecretStr = SecretStr("sk-hunter2")


async def run_once(seen: Seen, **options: Any) -> None:
    runner = quick(seen.hooks(**options))
    add = runner.node("add", input=State, output=State)(computing(lambda state: State(n=state.n + 1)))
    await runner.run(Pipeline("sums", [add]), State())


@pytest.mark.core
async def test_names_of_the_latest_conventions() -> None:
    """A run is an agent invocation by its pipeline's name; names that the conventions removed are gone."""
    seen = Seen()
    await run_once(seen)
    run, node = seen.span("invoke_workflow sums"), seen.span("stroma.node add")
    assert (
        dict(run.attributes or {}).items()
        >= {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.agent.name": "sums",
            "stroma.pipeline": "sums",
        }.items()
    )
    scope = run.instrumentation_scope
    assert (scope.name, scope.schema_url) == ("stroma", "https://opentelemetry.io/schemas/gen-ai/0.1.0")
    assert scope.version
    assert list(seen.points("gen_ai.invoke_agent.duration")) == [
        (("gen_ai.agent.name", "sums"), ("stroma.status", "COMPLETED"))
    ]
    assert not seen.points("gen_ai.invoke_workflow.duration")
    for span in (run, node):
        assert "gen_ai.workflow.name" not in (span.attributes or {})
        assert "gen_ai.conversation.id" not in (span.attributes or {})  # Nobody gave one.


@pytest.mark.core
async def test_kinds_and_content_that_backends_show() -> None:
    """Runs, groups and nodes are chains; with content on, input and output stand where backends read them."""
    seen = Seen()
    await run_once(seen, content="redacted")
    for name, given, taken in (("invoke_workflow sums", 0, 1), ("stroma.node add", 0, 1)):
        shown = dict(seen.span(name).attributes or {})
        assert shown["openinference.span.kind"] == "CHAIN"
        assert json.loads(shown["input.value"])["n"] == given
        assert json.loads(shown["output.value"])["n"] == taken
        assert shown["input.mime_type"] == shown["output.mime_type"] == "application/json"
        assert "hunter2" not in str(shown)


async def test_without_the_vocabulary() -> None:
    """vocabulary="none" leaves all names of OpenInference out, and content under ours."""
    seen = Seen()
    await run_once(seen, content="redacted", vocabulary="none")
    for span in seen.spans:
        shown = dict(span.attributes or {})
        assert not [name for name in shown if name.startswith(("openinference", "input.", "output.", "llm."))]
        assert json.loads(shown["stroma.output"])["n"] == 1


#: Names, types and values of the registry of the conventions.
REGISTRY = json.loads(Path(__file__).with_name("gen_ai_registry.json").read_text("utf-8"))
TYPES = {"string": str, "int": int, "double": float, "boolean": bool}
#: What backends read, and no release of the conventions has: Langfuse's name of the cost.
NOT_OF_THE_CONVENTIONS = {"gen_ai.usage.cost"}


async def test_names_types_and_values_are_those_of_the_registry() -> None:
    """Every gen_ai attribute that is sent is in the registry by type, operations and providers by value."""
    seen = Seen()
    runner = quick(seen.hooks(inference="auto", content="redacted"))

    def node(role: Any) -> Any:
        @runner.node(f"a {role}", input=State, output=State, role=role)
        async def add(state: State) -> Any:
            return state, Usage(100, 20, 40, 10, model="claude-sonnet-4-5")

        return add

    nodes = [node(role) for role in ("agent", "tool", "retriever", "chain")]
    await runner.run(Pipeline("sums", nodes), State(), conversation="c-1", user="ada")
    sent: dict[str, set[Any]] = {}
    for span in seen.spans:
        for name, value in dict(span.attributes or {}).items():
            if name.startswith("gen_ai."):
                sent.setdefault(name, set()).add(value)
    assert sent.keys() - NOT_OF_THE_CONVENTIONS <= REGISTRY["attributes"].keys()
    for name in sent.keys() - NOT_OF_THE_CONVENTIONS:
        assert {type(value) for value in sent[name]} == {TYPES[REGISTRY["attributes"][name]]}, name
    assert sent["gen_ai.operation.name"] <= set(REGISTRY["operations"])
    assert sent["gen_ai.provider.name"] == {"anthropic"}
    assert set(_PROVIDERS.values()) <= set(REGISTRY["providers"])
    assert all(seen.points(name) for name in REGISTRY["histograms"])


def test_names_in_the_source_are_those_of_the_registry() -> None:
    """No exporter to OpenTelemetry writes a gen_ai name that the registry lacks, but old ones on request."""
    folder = Path(otel_hooks.__code__.co_filename).parents[1]
    files = [
        *folder.glob("*.py"),
        *(folder / "opentelemetry").glob("*.py"),
        *(folder / "datadog").glob("*.py"),
    ]
    names = {
        name for file in files for name in re.findall(r'"(gen_ai\.[a-z_.]*[a-z])"', file.read_text("utf-8"))
    }
    earlier = {*REGISTRY["removed"], "gen_ai.invoke_workflow.duration"}
    assert names - REGISTRY["attributes"].keys() <= {
        *REGISTRY["histograms"],
        *earlier,
        *NOT_OF_THE_CONVENTIONS,
    }
