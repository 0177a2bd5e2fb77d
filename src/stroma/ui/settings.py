"""Settings of one web interface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pydantic import BaseModel

from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history.facts import resume_options
from stroma.checkpoint.records import RunRecord
from stroma.contracts.checks.lineage import Lineage
from stroma.trace.redaction import Redact


class Submission(NamedTuple):
    """Settings of the form that submits runs of a pipeline.

    Attributes:
        model: class of the input.
        submit: submits a run, given its input and its id.
    """

    model: type[BaseModel]
    submit: Callable[[BaseModel, str], Awaitable[object]]


class Served(NamedTuple):
    """A pipeline that the interface was started with.

    Attributes:
        resume: resumes a run by its id, in a process of its own; None if its runs cannot be resumed.
        submission: how its runs are submitted; None if they cannot be.
        lineage: its lineage.
        budget: limits in its config, by field of ExecutionBudget.
    """

    resume: Callable[[str], None] | None = None
    submission: Submission | None = None
    lineage: Lineage | None = None
    budget: Mapping[str, float] = {}


_NOT_SERVED: Final = Served()


def _command(name: str, run: RunRecord | None) -> str:
    if run is None or name != "resume":
        return f"stroma {name} FILE.py:NAME"
    return " ".join(["stroma", name, run.run_id, "FILE.py:NAME", *resume_options(run)])


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one web interface.

    Attributes:
        store: store whose runs are shown.
        name: name of the store on pages, without a password.
        hosts: accepted Host headers, such as "127.0.0.1:8427".
        token: access token that clients must send; None if only this machine can connect.
        private_host: one of ``hosts`` that no other server uses; the token becomes a cookie only for it.
        redact: see RunConfig; applied to every state.
        pipelines: the pipelines that the interface was started with, by name.
        command: returns a command line for the same store: ``command("resume", record)``; "worker" and "run"
            also without a record.
        find_schema: returns the class of the answer that a node waits for, if it is imported.
        trace_url: address of a trace in the telemetry backend, with ``{trace_id}`` and ``{span_id}`` in it.
        poll_seconds: seconds between two reads of the store for open pages.
    """

    store: AsyncStates
    name: str
    hosts: Sequence[str]
    token: str | None = None
    private_host: str | None = None
    redact: Redact | None = None
    pipelines: Mapping[str, Served] = field(default_factory=dict[str, Served])
    command: Callable[[str, RunRecord | None], str] = _command
    find_schema: Callable[[Waiting], type[BaseModel] | None] = field(default=lambda one: None)
    trace_url: str | None = None
    poll_seconds: float = 1.0

    def served(self, record: RunRecord) -> Served:
        """Return the pipeline of a run; one without anything if the interface was started without it."""
        return self.pipelines.get(record.pipeline, _NOT_SERVED)
