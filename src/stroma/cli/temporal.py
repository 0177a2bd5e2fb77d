"""--temporal: the Temporal server of a command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from stroma._utils.text import clean
from stroma.cli.errors import Code, Problem
from stroma.cli.exporters import HostPort
from stroma.cli.stores import Database

if TYPE_CHECKING:
    from temporalio.client import Client
    from temporalio.service import RPCError

    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.engine.config import RunConfig

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
#: Default task queue of runs and workers.
TASK_QUEUE: Final = "stroma"


def temporal_options(func: F) -> F:
    """Add --temporal and its options to a command; the runs are in the store of --db."""
    for option in (
        click.option("--tls", is_flag=True, help="Use TLS, with TEMPORAL_TLS_... and TEMPORAL_API_KEY."),
        click.option(
            "--namespace",
            metavar="NAME",
            help="Namespace on the server.  [env: TEMPORAL_NAMESPACE; default: default]",
        ),
        click.option(
            "--task-queue", metavar="QUEUE", help=f"Task queue of the workers.  [default: {TASK_QUEUE}]"
        ),
        click.option(
            "--temporal",
            "address",
            type=HostPort("localhost:7233"),
            metavar="HOST:PORT",
            help="Temporal server that chooses the worker of each run.",
        ),
    ):
        func = option(func)
    return func


@dataclass(frozen=True, slots=True)
class TemporalCluster:
    """Temporal server and task queue of a command, and the options that select them again: ``words``."""

    address: str
    task_queue: str
    namespace: str | None
    tls: bool
    words: tuple[str, ...]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> TemporalCluster | None:
        """Remove the Temporal options from ``options`` and return them; None without --temporal."""
        settings = {name: options.pop(name) for name in ("address", "task_queue", "namespace", "tls")}
        if settings["address"] is None:
            unused = [name for name in ("task_queue", "namespace", "tls") if settings[name]]
            if unused:
                raise click.UsageError(f"--{unused[0].replace('_', '-')} needs --temporal HOST:PORT")
            return None
        words = ["--temporal", settings["address"]]
        for name in ("task_queue", "namespace"):
            if settings[name] is not None:
                words += [f"--{name.replace('_', '-')}", settings[name]]
        if settings["tls"]:
            words.append("--tls")
        return cls(**{**settings, "task_queue": settings["task_queue"] or TASK_QUEUE}, words=tuple(words))

    @property
    def name(self) -> str:
        return f"task queue {clean(self.task_queue, 100)!r} of {self.address}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that talks to the server. Raises Problem."""
        try:
            return asyncio.run(work)
        except Exception as error:
            rpc_error = getattr(sys.modules.get("temporalio.service"), "RPCError", ())
            if not isinstance(error, rpc_error):
                raise
            raise self._problem(cast("RPCError", error)) from error

    async def connect(self) -> Client:
        """Return a connected client. Raises Problem."""
        try:
            from temporalio.client import Client
            from temporalio.envconfig import ClientConfigProfile

            import stroma.drivers.temporal  # noqa: F401
        except ImportError as error:
            raise Problem(
                "--temporal needs the package temporalio",
                "install it with: pip install 'stroma-runner[temporal]'",
                code=Code.ENVIRONMENT,
            ) from error
        profile = ClientConfigProfile.load()
        settings: dict[str, Any] = {**profile.to_client_connect_config(), "target_host": self.address}
        if self.namespace is not None:
            settings["namespace"] = self.namespace
        if self.tls and not settings.get("tls"):
            settings["tls"] = True
        try:
            return await Client.connect(**settings)
        except (RuntimeError, ValueError) as error:
            raise Problem(
                f"no Temporal server answers at {self.address}: {clean(str(error), 300)}",
                "check the address, --tls and the API key; a server for tests: temporal server start-dev",
                code=Code.ENVIRONMENT,
            ) from error

    async def runner(self, database: Database, config: RunConfig | None = None) -> TemporalRunner:
        """Connect, and return a runner for the runs of a store. Raises Problem."""
        client = await self.connect()
        from stroma.drivers.temporal.runner import TemporalRunner

        return TemporalRunner(client, self.task_queue, database.store, config)

    def _problem(self, error: RPCError) -> Problem:
        return Problem(
            f"{self.address} answers {error.status.name}: {clean(error.message, 300)}",
            "check --namespace, and TEMPORAL_API_KEY or TEMPORAL_TLS_CLIENT_CERT_PATH and ..._KEY_PATH; or "
            "repeat the command when the server is available",
            code=Code.ENVIRONMENT,
        )

    async def check_access(self, client: Client) -> None:
        """Fail for a wrong namespace or key, which a worker would retry for ever."""
        from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=client.namespace))
