"""--redact: what a pipeline hides from its hooks is hidden here, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from stroma.trace.redaction import Redact

__all__ = ["redact_of", "redact_option"]

F = TypeVar("F", bound=Callable[..., Any])


def redact_option(func: F) -> F:
    """The option that every command has that shows states or messages of failures."""
    return click.option(
        "--redact",
        metavar="FILE_OR_MODULE:NAME",
        help="Hide in states and messages what the config of this pipeline redacts. The store has them in full.",
    )(func)


def redact_of(target: str | None) -> Redact | None:
    """The ``redact`` of a pipeline's config. Raises Problem."""
    if target is None:
        return None
    from stroma.cli.loading import load_pipeline  # Only who asks for it loads what runs pipelines.

    pipeline = load_pipeline(target)
    return None if pipeline.config is None else pipeline.config.redact
