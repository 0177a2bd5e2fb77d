"""`stroma send`."""

from __future__ import annotations

import asyncio

import click

from stroma._utils.text import clean
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.manager import CheckpointManager
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_json
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, db_option
from stroma.contracts.contract import ContractRegistry
from stroma.runner.runner import StromaRunner

__all__ = ["send"]


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("text", metavar="MESSAGE")
@click.option("--topic", default="", metavar="TEXT", help="Topic that the flow receives it on.")
@click.option("--id", "message_id", metavar="ID", help="Id of the message; sent again, it changes nothing.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.send/1".')
@db_option
def send(run_: str, text: str, topic: str, message_id: str | None, as_json: bool, db: str | None) -> int:
    """Send a message to a run, whose flow receives it.

    RUN is a run id, a prefix of one, or "last". MESSAGE is JSON, @FILE, or - for stdin. `flow.receive` takes
    the messages of a topic in the order in which they were sent. Workers of its pipeline continue a suspended
    run; without any, use `stroma resume`.
    """
    message, _, source = parse_json(text, "MESSAGE")
    database = Database.from_option(db)
    record = database.find(run_)
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))

    async def store() -> None:
        try:
            await runner.send(record.run_id, message, topic=topic, id=message_id)
        finally:
            await database.close()

    try:
        asyncio.run(store())
    except ValueError as error:
        raise Problem(f"{source} cannot be sent: {error}", code=Code.USAGE) from error
    except StoreError as error:
        if error.transient:
            raise database.problem(error) from error
        raise Problem(clean(str(error), 1000), code=Code.USAGE) from error
    if as_json:
        emit({"schema": "stroma.send/1", "run_id": record.run_id, "topic": topic, "status": record.status})
        return Code.OK
    err.line(f"the message to run {clean(record.run_id)} is stored")
    if record.status == "SUSPENDED":
        resume = database.hint("resume", id_word(record.run_id), "FILE.py:NAME")
        err.line(
            f"a worker that serves pipeline {clean(record.pipeline, 100)!r} continues the run; or continue it here: {resume}"
        )
    return Code.OK
