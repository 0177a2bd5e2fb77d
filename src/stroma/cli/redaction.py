"""--redact: the ``redact`` of a pipeline, for commands that only read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from stroma.trace.redaction import Redact

F = TypeVar("F", bound=Callable[..., Any])


def redact_option(func: F) -> F:
    """Add --redact to a command that shows states."""
    return click.option(
        "--redact", metavar="FILE_OR_MODULE:NAME", help="Pipeline whose redact applies to the states shown."
    )(func)


def load_redact(target: str | None) -> Redact | None:
    """Return the ``redact`` of a pipeline's config. Raises Problem."""
    if target is None:
        return None
    from stroma.cli.loading import load_pipeline  # Only who asks for it loads what runs pipelines.

    pipeline = load_pipeline(target)
    return None if pipeline.config is None else pipeline.config.redact
