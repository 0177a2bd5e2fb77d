"""--temporal: the Temporal server of a command."""

from __future__ import annotations

import asyncio
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

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> TemporalCluster | None:
        """Remove the Temporal options and return them; None without --temporal. Raises Problem."""
        address, task_queue = map(options.pop, ("address", "task_queue"))
        if address is None:
            if task_queue:
                raise click.UsageError("--task-queue needs --temporal HOST:PORT")
            return None
        try:
            import stroma.drivers.temporal  # noqa: F401
        except ImportError as error:
            raise Problem(str(error), code=Code.ENVIRONMENT) from error
        return cls(address, task_queue or TASK_QUEUE)

    @property
    def words(self) -> list[str]:
        """Options that select the same server and task queue."""
        return ["--temporal", self.address, "--task-queue", self.task_queue]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that talks to the server. Raises Problem."""
        from temporalio.service import RPCError

        try:
            return asyncio.run(work)
        except RPCError as error:
            raise self._problem(error) from error

    async def connect(self) -> Client:
        """Return a connected client. Raises Problem."""
        from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
        from temporalio.client import Client
        from temporalio.envconfig import ClientConfig

        try:
            settings: Any = ClientConfig.load_client_connect_config()
            client = await Client.connect(**{**settings, "target_host": self.address})
        except (RuntimeError, ValueError, OSError) as error:  # No server answers, or a file cannot be read.
            raise self._problem(error) from error
        # A worker would retry a wrong namespace for ever.
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=client.namespace))
        return client

    def _problem(self, error: Exception) -> Problem:
        return Problem(
            f"the Temporal server at {self.address} cannot be used: {clean(str(error), 300)}",
            "check the address, TEMPORAL_NAMESPACE, TEMPORAL_API_KEY and TEMPORAL_TLS; a server for tests: "
            "temporal server start-dev",
            code=Code.ENVIRONMENT,
        )
