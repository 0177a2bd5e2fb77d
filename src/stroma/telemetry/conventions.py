"""Names that backends read: OpenTelemetry's generative-AI conventions, OpenInference's, and ours beside them.

They are constants of ours: the conventions are in development, and the packages that had them call them
deprecated.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from stroma.contracts.contract import Role
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode

Vocabulary = Literal["openinference", "none"]

#: Name of our tracer and meter, that of OpenInference's for LangChain, and the conventions that ours follow;
#: https://github.com/open-telemetry/semantic-conventions-genai
SCOPE: Final = "stroma"
LANGCHAIN: Final = "openinference.instrumentation.langchain"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/gen-ai/0.1.0"
NODE_ID: Final = "stroma.node.id"
#: What every span inside a run says of it.
OF_RUN: Final = (
    "stroma.pipeline",
    "stroma.run.id",
    "session.id",
    "gen_ai.conversation.id",
    "user.id",
    "stroma.tags",
)
#: The operation of a node by its role, and the attribute with its name. Neither has one for a step of a
#: pipeline.
_OPERATIONS: Final[dict[Role | None, tuple[str, str | None]]] = {
    "agent": ("invoke_agent", "gen_ai.agent.name"),
    "tool": ("execute_tool", "gen_ai.tool.name"),
    "retriever": ("retrieval", None),
}
#: Keys of the attributes in the notes of a run.
_ABOUT: Final = "attributes of spans"
_ATTRIBUTION: Final = "attribution"


def note_run(run: ReliabilityContext) -> None:
    """Store the attributes of a run for its spans; from its start hooks on, when its session is open."""
    if _ABOUT not in run.notes:
        run.notes[_ATTRIBUTION] = attribution_of(run)
        run.notes[_ABOUT] = about_run(run)


def about_run(run: ReliabilityContext) -> dict[str, Any]:
    """Return the attributes of a run that all spans inside it have. Callers must not change the dict."""
    stored: dict[str, Any] | None = run.notes.get(_ABOUT)
    if stored is not None:
        return stored
    return {
        "stroma.pipeline": run.pipeline,
        "stroma.run.id": run.run_id,
        "session.id": run.session_id,
        **attribution_of(run),
    }


def attribution_of(run: ReliabilityContext) -> dict[str, Any]:
    """Return the conversation, user and tags of a run, if it has them. Callers must not change the dict."""
    stored: dict[str, Any] | None = run.notes.get(_ATTRIBUTION)
    if stored is not None:
        return stored
    attribution: dict[str, Any] = {}
    if run.conversation is not None:
        attribution["gen_ai.conversation.id"] = run.conversation
    if run.user is not None:
        attribution["user.id"] = run.user
    if run.config.tags:
        attribution["stroma.tags"] = run.config.tags
    return attribution


def operation_of(node: RunningNode) -> dict[str, str]:
    """Return what the conventions call a node that is an agent, a tool or a retriever; {} for any other."""
    operation, name = _OPERATIONS.get(node.role, (None, None))
    if operation is None:
        return {}
    return {"gen_ai.operation.name": operation} | ({} if name is None else {name: node.node_id})


def content_of(direction: Literal["input", "output"], text: str, *, is_text: bool) -> dict[str, str]:
    """Return the attributes that show a state, as JSON or text, in backends that read OpenInference."""
    kind = "text/plain" if is_text else "application/json"
    return {f"{direction}.value": text, f"{direction}.mime_type": kind}
