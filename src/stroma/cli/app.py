"""The command group and the exit code of each command."""

from __future__ import annotations

import importlib
import io
import sys
import traceback
from typing import Final

import click

from stroma._utils.access import error_text
from stroma._utils.distributions import installed_version
from stroma._utils.text import did_you_mean
from stroma.cli.errors import Code, Problem, is_debugging
from stroma.cli.output import OutputError, err, out

#: Help line of each command, so that the help imports none of them.
_COMMANDS: Final = {
    "demo": "Run a demo pipeline; needs no key and no network.",
    "run": "Run a pipeline and print its final state.",
    "resume": "Resume a stopped run without repeating finished nodes.",
    "submit": "Submit a run, which a worker starts.",
    "worker": "Execute submitted runs and continue stopped ones, until SIGTERM.",
    "drive": "Continue one run as far as possible.",
    "approve": "Answer a suspended run.",
    "send": "Send a message to a run, whose flow receives it.",
    "pause": "Pause a run until it is resumed.",
    "cancel": "Cancel a run, whichever process runs it.",
    "check": "Check that each node's output fits the next node's input.",
    "graph": "Draw which field of a node feeds which other field.",
    "runs": "List the runs in a store, newest first.",
    "show": "Show one run, attempt by attempt.",
    "diff": "Compare two runs field by field.",
    "replay": "Replay a recorded run and report changed behaviour.",
    "record": "Write a recorded run as a regression test or as JSON.",
    "tail": "Follow runs, one line for each attempt.",
    "ui": "Serve the web interface on this machine (extra `ui`).",
    "mcp": "Serve runs to a coding agent, read-only (extra `mcp`).",
    "export": "Write a run as JSON or one HTML file.",
    "prices": "Show the prices of models and their sources.",
    "budget": "Show a shared budget, or change the budget of a run.",
    "limit": "Show a rate limit: its last minute and its cooldown.",
    "telemetry": "Write dashboards and alert rules.",
    "gc": "Delete old runs from the store.",
    "doctor": "Check the store, packages, clock and disk.",
    "completion": "Print a script for shell completion.",
}
#: Modules that define several commands; any other command has a module of its name.
_MODULES: Final = {
    "resume": "run",
    "drive": "submit",
    "send": "control",
    "pause": "control",
    "cancel": "control",
    "budget": "limits",
    "limit": "limits",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"stroma.cli.commands.{_MODULES.get(cmd_name, cmd_name)}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            hint = did_you_mean(name, _COMMANDS) or f"the commands are: {', '.join(_COMMANDS)}"
            raise click.UsageError(f"unknown command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _print_version(ctx: click.Context, _parameter: click.Parameter, is_requested: bool) -> None:
    if is_requested and not ctx.resilient_parsing:
        out.line(f"stroma {installed_version('stroma-runner') or '(not installed: no version)'}")
        ctx.exit()


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 the run failed, 2 usage, 3 environment, 4 not found, 5 stopped by the "
    "budget, "
    "6 diff or replay found differences, 7 suspended: a node waits for an answer, 130 interrupted; "
    "committed outputs are stored.",
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
    """Run guarded pipelines and inspect every step of every run."""


def start(argv: list[str], program: str) -> int:
    """Run one command; return its exit code.

    Every failure is printed as one message, with STROMA_DEBUG=1 as a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # A terminal may not encode every text.
    try:
        code = _guarded(argv, program)
    except click.UsageError as error:
        _show_usage_error(error)
        code = Code.USAGE
    except click.ClickException as error:
        if is_debugging():
            traceback.print_exc()
        error.show()
        code = error.code if isinstance(error, Problem) else error.exit_code
    return code


def _guarded(argv: list[str], program: str) -> int:
    try:
        code = app.main(argv, prog_name=program, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        err.line("stroma: stopped")
        return Code.INTERRUPTED
    except BrokenPipeError:  # The reader closed the pipe, as head does.
        out.silence()
        return Code.OK
    except click.ClickException:
        raise
    except OutputError as error:
        raise Problem(
            f"cannot write the output: {error}; free disk space, or redirect it", code=Code.ENVIRONMENT
        ) from error
    except Exception as error:
        from stroma.checkpoint.errors import StoreError

        if isinstance(error, StoreError):
            from stroma.cli.stores import store_problem

            raise store_problem(error) from error
        if isinstance(error, UnicodeEncodeError):
            for word in argv:
                if error.object[error.start] in word:  # Bytes of the terminal, as Python represents them.
                    raise Problem(f"argument {word!r} is not UTF-8 text; pass it in UTF-8") from error
        if is_debugging():
            raise
        raise Problem(
            f"internal error: {error_text(error)}",
            "set STROMA_DEBUG=1 to see the traceback, and report it",
            code=Code.ENVIRONMENT,
        ) from error
    return code if isinstance(code, int) else Code.OK


def _show_usage_error(error: click.UsageError) -> None:
    path = error.ctx.command_path if error.ctx is not None else "stroma"
    message = error.format_message()
    if error.ctx is not None and message == error.ctx.get_help():  # A group without a command.
        for line in message.splitlines():
            err.line(line)
        return
    Problem(message[:1].lower() + message[1:].rstrip("."), f"show the usage: {path} --help").show()
