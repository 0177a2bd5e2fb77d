"""Settings of one web interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stroma.checkpoint.durable.states import AsyncStates
from stroma.trace.redaction import Redact

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What one web interface shows, and to whom.

    Attributes:
        store: whose runs are shown.
        name: what the pages call the store; without a password.
        hosts: what the Host header may be: "127.0.0.1:8427".
        token: what everybody must show who connects; None where only this machine can.
        private_host: one of ``hosts`` whose name nobody else has; only under it the token becomes a cookie.
        redact: see RunConfig; applied to every state.
        pipeline: the name of the pipeline whose runs can be resumed from here; None if none can.
        resume: begins a process that resumes a run, by its id.
        command: the words of a command of ours that finds the same store: ``command("resume", "RUN")``.
        lineage: the picture of ``pipeline``, as SVG.
        poll_seconds: how often the store is looked at for pages that are open.
    """

    store: AsyncStates
    name: str
    hosts: Sequence[str]
    token: str | None = None
    private_host: str | None = None
    redact: Redact | None = None
    pipeline: str | None = None
    resume: Callable[[str], None] | None = None
    command: Callable[..., str] = field(default=lambda *words: " ".join(["stroma", *words]))
    lineage: str | None = None
    poll_seconds: float = 1.0
