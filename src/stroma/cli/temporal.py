"""--temporal: the Temporal server of a command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from stroma._utils.text import clean
from stroma.cli.errors import Code, Problem
from stroma.cli.exporters import HostPort
from stroma.cli.stores import add_options

if TYPE_CHECKING:
    from temporalio.client import Client

T = TypeVar("T")
#: Default task queue of runs and workers.
TASK_QUEUE: Final = "stroma"


#: Adds --temporal and its options to a command; the runs are in the store of --db.
temporal_options = add_options(
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
)


@dataclass(frozen=True, slots=True)
class TemporalCluster:
    """Temporal server and task queue of a command."""

    address: str
    task_queue: str
    namespace: str | None
    tls: bool

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> TemporalCluster | None:
        """Remove the Temporal options from ``options`` and return them; None without --temporal."""
        names = ("address", "task_queue", "namespace", "tls")
        address, task_queue, namespace, tls = map(options.pop, names)
        if address is not None:
            return cls(address, task_queue or TASK_QUEUE, namespace, tls)
        if task_queue or namespace or tls:
            raise click.UsageError("--task-queue, --namespace or --tls needs --temporal HOST:PORT")
        return None

    @property
    def words(self) -> list[str]:
        """Options that select the same server and task queue."""
        words = ["--temporal", self.address, "--task-queue", self.task_queue]
        words += [] if self.namespace is None else ["--namespace", self.namespace]
        return [*words, "--tls"] if self.tls else words

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that talks to the server. Raises Problem."""
        try:
            return asyncio.run(work)
        except Exception as error:
            rpc_error = getattr(sys.modules.get("temporalio.service"), "RPCError", ())
            if not isinstance(error, rpc_error):
                raise
            raise self._problem(error) from error

    async def connect(self) -> Client:
        """Return a connected client. Raises Problem."""
        try:
            import stroma.drivers.temporal  # noqa: F401
        except ImportError as error:
            raise Problem(str(error), code=Code.ENVIRONMENT) from error
        from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
        from temporalio.client import Client
        from temporalio.envconfig import ClientConfig

        try:
            settings: dict[str, Any] = {
                **ClientConfig.load_client_connect_config(),
                "target_host": self.address,
            }
            if self.namespace is not None:
                settings["namespace"] = self.namespace
            settings["tls"] = settings.get("tls") or self.tls
            client = await Client.connect(**settings)
        except (RuntimeError, ValueError, OSError) as error:  # No server answers, or a file cannot be read.
            raise self._problem(error) from error
        # A worker would retry a wrong namespace for ever.
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=client.namespace))
        return client

    def _problem(self, error: Exception) -> Problem:
        return Problem(
            f"the Temporal server at {self.address} cannot be used: {clean(str(error), 300)}",
            "check the address, --namespace, --tls, TEMPORAL_API_KEY and TEMPORAL_TLS_...; a server for "
            "tests: temporal server start-dev",
            code=Code.ENVIRONMENT,
        )
