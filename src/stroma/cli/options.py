"""Options of commands that run a pipeline."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import click
from pydantic import ValidationError

from stroma._utils.models import complaints_of
from stroma.cli.exporters import Exporters, exporter_options
from stroma.cli.stores import add_options, db_option
from stroma.contracts.contract import check_id
from stroma.engine.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of commands that run a pipeline.

    Attributes:
        drain: seconds for the node in flight after a SIGTERM.
        exporters: enabled exporters.
        loop: the event loop of several runs, which are listed in place of their final states.
    """

    budget_usd: float | None = None
    budget_tokens: int | None = None
    as_json: bool = False
    quiet: bool = False
    drain: float = 10.0
    if_running: Literal["attach", "take_over"] | None = None
    exporters: Exporters = field(default_factory=Exporters)
    loop: asyncio.Runner | None = None

    @classmethod
    def from_click(cls, *, attach: bool, take_over: bool, **options: Any) -> Self:
        """Build the options from the parameters that click parsed."""
        if attach and take_over:
            raise click.UsageError("--attach and --take-over exclude each other; pass one")
        exporters = Exporters.from_options(options)
        if_running: Literal["attach", "take_over"] | None = "attach" if attach else None
        return cls(**options, if_running="take_over" if take_over else if_running, exporters=exporters)


class FiniteRange(click.FloatRange):
    """Range of finite numbers: FloatRange takes NaN, and infinity where it has no maximum."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"must be a finite number, got {number}", param, ctx)
        return number


def add_tags(config: RunConfig, tags: tuple[str, ...]) -> RunConfig:
    """Return a config with the tags of ``--tag`` too. Raises UsageError."""
    try:
        all_tags = RunConfig(tags=(*config.tags, *tags)).tags
    except ValidationError as error:
        raise click.UsageError(f"--tag: {complaints_of(error)[0][1]}") from None
    return config.model_copy(update={"tags": all_tags})


def run_id_option(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Return the run id of an option, None if there is none. Raises BadParameter for an illegal id."""
    if value is not None:
        try:
            check_id(value, "the run id")
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


#: Adds the options of commands that run a pipeline.
run_options = add_options(
    click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr."),
    click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.run/1".'),
    click.option(
        "--budget-tokens", type=click.IntRange(min=0), metavar="N", help="Token limit that stops the run."
    ),
    click.option(
        "--budget-usd",
        type=FiniteRange(min=0),
        metavar="USD",
        help="Cost limit that stops the run, in US dollars.",
    ),
    click.option(
        "--drain",
        type=FiniteRange(min=0),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Seconds for the node in flight after a SIGTERM.",
    ),
    click.option(
        "--take-over",
        is_flag=True,
        help="Take over the run from its owner; only safe if that process is dead.",
    ),
    click.option("--attach", is_flag=True, help="If another process runs it, wait for its result."),
    exporter_options,
    db_option,
)
