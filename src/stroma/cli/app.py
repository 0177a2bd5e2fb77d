"""The group of all commands, and how each of them ends."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

import click

from stroma.cli.errors import Code, Problem, debugging
from stroma.cli.output import OutputError, err, out

__all__ = ["app", "start"]

#: By name: where the command is, and its line in the help. Nothing is imported to show that.
_COMMANDS: Final = {
    "demo": (
        "stroma.cli.commands.demo:demo",
        "Run the demo: a pipeline over real documents. No key, no network.",
    ),
    "run": ("stroma.cli.commands.run:run", "Run a pipeline and print its final state."),
    "resume": (
        "stroma.cli.commands.run:resume",
        "Go on with a run that stopped; finished nodes are not called again.",
    ),
    "worker": (
        "stroma.cli.commands.worker:worker",
        "Run nodes for runs on a Temporal cluster (extra `temporal`).",
    ),
    "approve": ("stroma.cli.commands.approve:approve", "Give a suspended run the answer that it waits for."),
    "cancel": ("stroma.cli.commands.cancel:cancel", "Ask for the end of a run, in whichever process it is."),
    "check": (
        "stroma.cli.commands.check:check",
        "Prove that each node's output can satisfy the next node's input.",
    ),
    "graph": ("stroma.cli.commands.graph:graph", "Print which field of which node feeds which."),
    "runs": ("stroma.cli.commands.runs:runs", "List the runs in the store, the newest first."),
    "show": ("stroma.cli.commands.show:show", "Show one run, attempt by attempt."),
    "diff": ("stroma.cli.commands.diff:diff", "Tell two runs apart, field by field."),
    "replay": (
        "stroma.cli.commands.replay:replay",
        "Run a recorded run again without calls, and say where the code behaves differently now.",
    ),
    "record": ("stroma.cli.commands.record:record", "Write a recorded run as a regression test, or as JSON."),
    "tail": ("stroma.cli.commands.tail:tail", "Print what runs come to, as it is recorded."),
    "ui": (
        "stroma.cli.commands.ui:ui",
        "Show the runs of a store in a browser on this machine (extra `ui`).",
    ),
    "export": (
        "stroma.cli.commands.export:export",
        "Write a run as JSON, OTLP or one HTML file.",
    ),
    "prices": (
        "stroma.cli.commands.prices:prices",
        "Show what tokens of a model cost, and where that price is from.",
    ),
    "budget": (
        "stroma.cli.commands.budget:budget",
        "Show a budget that runs share: spent, reserved, and until when.",
    ),
    "telemetry": (
        "stroma.cli.commands.telemetry:telemetry",
        "Dashboards and alerts for the runs that are exported.",
    ),
    "gc": ("stroma.cli.commands.gc:gc", "Delete old runs from the store."),
    "doctor": ("stroma.cli.commands.doctor:doctor", "Check the store, the packages, the clock and the disk."),
    "completion": (
        "stroma.cli.commands.completion:completion",
        "Print the script by which a shell completes commands.",
    ),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, _COMMANDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the commands are: {', '.join(_COMMANDS)}"
            raise click.UsageError(f"there is no command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib import metadata

        try:
            version = metadata.version("stroma")
        except metadata.PackageNotFoundError:
            version = "(not installed: no version)"
        out.line(f"stroma {version}")
        ctx.exit()


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 the run failed, 2 usage, 3 environment, 4 not found, 5 stopped by the budget, "
    "6 diff or replay found differences, 7 suspended: a node waits for a person, 130 interrupted with everything committed kept.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def app() -> None:
    """Run guarded pipelines, and see every step of every run."""


def start(argv: list[str], program: str) -> int:
    """Run one command. Whatever happens ends in one message and an exit code; with STROMA_DEBUG=1 in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Any text can be shown, on any terminal.
    try:
        code = _guarded(lambda: app.main(argv, prog_name=program, standalone_mode=False))
    except click.UsageError as error:
        _show_usage_error(error)
        code = Code.USAGE
    except click.ClickException as error:
        if debugging():
            traceback.print_exc()
        error.show()
        code = error.code if isinstance(error, Problem) else error.exit_code
    return code


def _guarded(call: Callable[[], Any]) -> int:
    try:
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise Problem(
                "the current directory is gone: it was deleted or renamed",
                "change to another one, or to the same name again: cd .",
                code=Code.ENVIRONMENT,
            ) from error
        code = call()
    except (click.Abort, KeyboardInterrupt):
        err.line("stroma: stopped")
        return Code.INTERRUPTED
    except BrokenPipeError:  # Whoever read the output has what it wanted.
        out.silence()
        return Code.OK
    except click.ClickException:
        raise
    except OutputError as error:
        raise Problem(
            f"the output could not be written: {error}; make room, or send it elsewhere",
            code=Code.ENVIRONMENT,
        ) from error
    except Exception as error:
        if debugging():
            raise
        raise Problem(
            f"this should not have happened: {type(error).__name__}: {error}",
            "see where by setting STROMA_DEBUG=1, and please report it",
            code=Code.ENVIRONMENT,
        ) from error
    return code if isinstance(code, int) else Code.OK


def _show_usage_error(error: click.UsageError) -> None:
    path = error.ctx.command_path if error.ctx is not None else "stroma"
    message = error.format_message()
    Problem(
        message[:1].lower() + message[1:].rstrip("."), f"see how to call it: {path} --help", code=Code.USAGE
    ).show()
