"""Options of every command that runs a pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import click

from stroma.cli.exporters import Exporters, exporter_options
from stroma.cli.stores import db_option
from stroma.contracts.contract import check_id

__all__ = ["Running", "run_id_option", "running_options"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Running:
    """The options of every command that runs a pipeline.

    Attributes:
        drain: seconds that the node in flight has left after a SIGTERM.
        exporters: where telemetry goes.
    """

    budget_usd: float | None = None
    budget_tokens: int | None = None
    as_json: bool = False
    quiet: bool = False
    drain: float = 10.0
    if_running: Literal["attach", "take_over"] | None = None
    exporters: Exporters = field(default_factory=Exporters)

    @classmethod
    def of(cls, *, attach: bool, take_over: bool, **options: Any) -> Self:
        """From what click has read."""
        if attach and take_over:
            raise click.UsageError("--attach waits for whoever has the run, --take-over does not; give one")
        exporters = Exporters.take(options)
        if_running: Literal["attach", "take_over"] | None = "attach" if attach else None
        return cls(**options, if_running="take_over" if take_over else if_running, exporters=exporters)


def _dollars(_ctx: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value} is no amount of money; give dollars, zero or more")
    return value


def _seconds(_ctx: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value} is no time to wait; give seconds, zero or more")
    return value


def run_id_option(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            check_id(value, "the run id")
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def running_options(func: F) -> F:
    """The options of every command that runs a pipeline."""
    for option in (
        click.option(
            "-q", "--quiet", is_flag=True, help="Say nothing on stderr unless something goes wrong."
        ),
        click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.run/1".'),
        click.option("--budget-tokens", type=click.IntRange(min=0), metavar="N", help="Stop above N tokens."),
        click.option(
            "--budget-usd", type=float, callback=_dollars, metavar="USD", help="Stop above USD dollars."
        ),
        click.option(
            "--drain",
            type=float,
            callback=_seconds,
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="What the node in flight has left after a SIGTERM.",
        ),
        click.option(
            "--take-over",
            is_flag=True,
            help="Take the run from whoever has it: only if that process is known to be gone.",
        ),
        click.option(
            "--attach", is_flag=True, help="If somebody else is at work on the run, wait for its result."
        ),
        exporter_options,
        db_option,
    ):
        func = option(func)
    return func
