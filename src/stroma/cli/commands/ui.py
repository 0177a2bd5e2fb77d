"""`stroma ui`."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from stroma._utils.child_process import child_command, child_environment
from stroma._utils.text import format_host
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.history.facts import resume_options
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.records import RunRecord
from stroma.cli.errors import Code, Problem, cannot_listen
from stroma.cli.formatting import id_word
from stroma.cli.inputs import input_model
from stroma.cli.loading import load_with_module, refuse_same_names
from stroma.cli.output import err, out
from stroma.cli.stores import TARGET, Database, db_option
from stroma.cli.suspended import find_schema
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, find_node
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner

if TYPE_CHECKING:
    from stroma.contracts.checks.lineage import Lineage
    from stroma.trace.redaction import Redact
    from stroma.ui.settings import Submission

_PORT = 8427


@click.command()
@click.argument("targets", metavar="[FILE_OR_MODULE:NAME]...", nargs=-1)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_PORT,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on."
)
@click.option(
    "--token",
    envvar="STROMA_UI_TOKEN",
    metavar="TEXT",
    help="Access token that clients must send (at least 16 characters).  [env: STROMA_UI_TOKEN; "
    "default: a new one]",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Additional host name, as of a proxy in front.",
)
@click.option(
    "--trace-url",
    envvar="STROMA_TRACE_URL",
    metavar="URL",
    help="Address of a trace in your backend, with {trace_id} in it.  [env: STROMA_TRACE_URL]",
)
@db_option
def ui(
    targets: tuple[str, ...],
    port: int,
    host: str,
    token: str | None,
    names: tuple[str, ...],
    trace_url: str | None,
    db: str | None,
) -> int:
    """Serve the web interface of a store on this machine.

    With pipelines, their runs can be submitted and resumed from pages, the redact of each config applies to
    all runs, and their lineage is drawn. Only the buttons change or run anything.
    """
    try:
        from stroma.ui import Settings, make_app, serve
        from stroma.ui.settings import Served
    except ImportError as error:
        raise Problem(str(error), code=Code.ENVIRONMENT) from error
    loopback, is_generated = _is_loopback(host), token is None
    token = _check_token(token, host, loopback)
    database = Database.from_option(db)
    # Only with a pipeline, runs can be submitted into a store that does not exist yet.
    store = database.reader if not targets else database.require_durable()
    if trace_url is not None and not trace_url.startswith(("http://", "https://")):
        raise Problem("--trace-url must begin with http:// or https://")
    loaded = [load_with_module(target, database) for target in targets]
    refuse_same_names([pipeline for pipeline, _ in loaded])
    pipelines: dict[str, Served] = {}
    target_of: dict[str, str] = {}
    for target, (pipeline, _) in zip(targets, loaded, strict=True):
        resume, submission = _resumer(target, db), _submission(store, pipeline, target)
        pipelines[pipeline.name] = Served(resume, submission, _lineage(pipeline), _limits_of(pipeline))
        target_of[pipeline.name] = target
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    shown_host = format_host(host)
    # A cookie goes to every port of its host. Browsers resolve all names under localhost to this machine.
    private_host = f"stroma-{secrets.token_hex(8)}.localhost:{port}" if loopback and token else None
    address = f"http://{private_host or f'{shown_host}:{port}'}/"
    hosts = [f"{shown_host}:{port}", *names, *([] if private_host is None else [private_host])]
    settings = Settings(
        store=store,
        name=database.name,
        hosts=_with_other_names(hosts, port, loopback),
        token=token or None,
        private_host=None if private_host is None else private_host.removesuffix(":80"),
        redact=_redact_of([pipeline for pipeline, _ in loaded]),
        pipelines=pipelines,
        command=_hint(database, target_of),
        find_schema=partial(find_schema, modules=[module for _, module in loaded]),
        trace_url=trace_url,
    )
    # A token of the user's is in their environment or command line: here it is not repeated.
    out.line(f"{address}{f'?token={token}' if token and is_generated else '?token=...' if token else ''}")
    if private_host is not None:
        other = f"http://{shown_host}:{port}/ with the token as the password"
        err.line((f"if the browser does not find that: {other}", "dim"))
    err.line(("stop with Ctrl-C", "dim"))
    with contextlib.closing(listening), contextlib.suppress(KeyboardInterrupt):
        serve(make_app(settings), listening)
    return Code.OK


def _check_token(token: str | None, host: str, loopback: bool) -> str | None:
    """Return the access token: the given one, or a new one for the loopback interface. Raises Problem."""
    if token is None and loopback:
        return secrets.token_urlsafe(24)
    if not loopback and not token:
        raise Problem(
            f"--host {host} can be reached from other machines, and there is no access token",
            "pass a token: STROMA_UI_TOKEN=... stroma ui --host ..., or leave out --host",
        )
    if token and len(token) < 16:
        raise Problem("the token must have at least 16 characters")
    return token


def _with_other_names(hosts: list[str], port: int, loopback: bool) -> list[str]:
    """Return the accepted hosts, with the usual names of this machine, and without the default port."""
    if loopback:
        hosts = [*hosts, f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"]
    if port == 80:
        hosts = [*hosts, *(name.rpartition(":")[0] for name in hosts if name.endswith(":80"))]
    return hosts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; from here on clients can connect. Raises Problem."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise cannot_listen("", (host, port), error, "take another one: stroma ui --port 0") from error


def _hint(database: Database, target_of: dict[str, str]) -> Callable[[str, RunRecord | None], str]:
    """Return a function for command lines: with the pipelines of the interface, or what ran a run last.

    ``target_of``: FILE_OR_MODULE:NAME by the name of the pipeline.
    """

    def command(name: str, run: RunRecord | None) -> str:
        if run is None:
            return database.hint(name, *(target_of.values() or (TARGET,)))
        target = target_of.get(run.pipeline) or database.target_of(run)
        if name != "resume":
            return database.hint(name, target)
        return database.hint(name, id_word(run.run_id), target, options=resume_options(run))

    return command


def _resumer(target: str, db: str | None) -> Callable[[str], None]:
    """Return a function that resumes a run in a process of its own, which outlives the interface."""

    def resume(run_id: str) -> None:
        # The store by the environment: every process can see the options of a command.
        env = child_environment(STROMA_DB=db) if db else child_environment()
        arguments_text = child_command("resume", "--quiet", "--", run_id, target)
        process = subprocess.Popen(
            arguments_text,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=process.wait, daemon=True).start()  # Or it would stay as a zombie.

    return resume


def _submission(store: AsyncStates, pipeline: Pipeline, target: str) -> Submission | None:
    """Return how runs of a pipeline are submitted; None if it starts with a group, which no worker serves."""
    from stroma.ui.settings import Submission

    if not pipeline.nodes or isinstance(find_node(pipeline.nodes[0]), Group):
        return None
    runner = StromaRunner(ContractRegistry(), CheckpointManager(store))

    async def submit(state: BaseModel, run_id: str) -> None:
        await runner.submit(pipeline, state, run_id=run_id)
        await store.attribute(run_id, {"target": target})

    return Submission(input_model(pipeline), submit)


def _redact_of(pipelines: Sequence[Pipeline]) -> Redact | None:
    """Return a function that applies the redact of each pipeline; None without any."""
    all_redacts = [one.config.redact for one in pipelines if one.config and one.config.redact]

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return reduce(lambda shown, one: one(shown), all_redacts, state)

    return redact if all_redacts else None


def _limits_of(pipeline: Pipeline) -> dict[str, float]:
    budget = None if pipeline.config is None else pipeline.config.budget
    return {} if budget is None else budget.model_dump(exclude_none=True)


def _lineage(pipeline: Pipeline) -> Lineage:
    from stroma.contracts.checks.lineage import lineage_of

    return lineage_of(pipeline.name, [find_node(node) for node in pipeline.nodes], ContractRegistry())
