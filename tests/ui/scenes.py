"""Runs for pictures and tests of pages: retries, maps, flows, suspended and living runs."""

import asyncio
import contextlib
import random
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.kit import passing

from stroma import (
    ExecutionBudget,
    FailurePolicy,
    Flow,
    Pipeline,
    RunConfig,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.contracts import ContractRegistry
from stroma.contracts.checks.lineage import Lineage, lineage_of
from stroma.contracts.node import find_node

BUDGET = 0.005


class Invoice(BaseModel):
    number: str = "2026-0117"
    pages: list[str] = ["one", "two", "three"]


class Line(BaseModel):
    text: str = ""
    price: float = 0.0


class Read(BaseModel):
    number: str
    lines: list[Line]


class Total(BaseModel):
    number: str
    total: float
    currency: str


class Booking(BaseModel):
    number: str
    account: str


class Page(BaseModel):
    text: str


class Book(BaseModel):
    pages: list[Page]
    words: list[Page] = []


class Draft(BaseModel):
    text: str = "Dear Ada,"
    round: int = 0


class Verdict(BaseModel):
    is_good: bool = False
    text: str = ""


class Approval(BaseModel):
    approved: bool
    note: str


def _node(node_id: str, func: Any, input_model: type[BaseModel], output_model: type[BaseModel]) -> Any:
    return stroma_node(node_id, input=input_model, output=output_model)(func)


def invoices(dice: random.Random, *, breaks: bool = False, asks: bool = False, hangs: Any = None) -> Pipeline:
    """Return a pipeline whose provider is slow at times; it breaks a contract, asks a person, or hangs."""

    async def fetch(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0.02, 0.04))
        return {"number": state.number, "pages": state.pages}

    async def extract(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0.03, 0.09))
        node = current_node_or_none()
        if node is not None and node.attempt == 1 and (breaks or dice.random() < 0.5):
            node.report_usage(input_tokens=900, model="gpt-4o-mini")
            raise TimeoutError("the provider did not answer within 30 s")
        lines = [{"text": f"item {i}", "price": 12.5 * i} for i in range(1, 4)]
        return {"number": state.number, "lines": lines}, 1800, 420, "gpt-4o-mini"

    async def total(state: Any) -> Any:
        await asyncio.sleep(0.02)
        if hangs is not None:
            await asyncio.to_thread(hangs.wait, 600)
        findings = {"number": state.number, "total": "75,00" if breaks else 75.0, "currency": "EUR"}
        return findings, 640, 60, "gpt-4o"

    async def book(state: Any) -> Any:
        if asks:
            raise Suspend("May 75.00 EUR be booked on account 4400?", schema=Approval)
        await asyncio.sleep(0.01)
        return {"number": state.number, "account": "4400"}

    async def page(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0.01, 0.05))
        return state, 300, 20, "gpt-4o-mini"

    quick = FailurePolicy(max_retries=3, backoff_seconds=0.08)
    nodes = [
        _node("fetch", fetch, Invoice, Invoice),
        parallel(_node("pages", page, Invoice, Invoice), _node("stamps", page, Invoice, Invoice)),
        _node("extract", extract, Invoice, Read),
        _node("total", total, Read, Total),
        _node("book", book, Total, Booking),
    ]
    config = RunConfig(policy_map={"RECOVERABLE": quick}, budget=ExecutionBudget(max_cost_usd=BUDGET))
    return Pipeline("invoices", nodes, config=config)


def lineage(pipeline: Pipeline) -> Lineage:
    return lineage_of(pipeline.name, [find_node(node) for node in pipeline.nodes], ContractRegistry())


async def make_map(store: Any, items: int, run_id: str) -> None:
    """Run a map over so many items: some are retried, some fail for good."""
    dice = random.Random(3)

    async def read(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0, 0.004))
        node = current_node()
        if node.attempt == 1 and dice.random() < 0.08:
            raise TimeoutError("the provider did not answer within 30 s")
        if int(state.text.split()[1]) % 61 == 17:
            raise ValueError("the page has no text")
        return {"text": state.text}, 210, 30, "gpt-4o-mini"

    quick = FailurePolicy(max_retries=2, backoff_seconds=0.01)
    reader = _node("read page", read, Page, Page)
    group = map_over("pages", reader, into="words", max_concurrency=16, on_item_failure="collect")
    pipeline = Pipeline("book", [group, _node("bind", passing(), Book, Book)])
    runner = StromaRunner.quick(store=store, policy_map={"RECOVERABLE": quick, "AMBIGUOUS": quick})
    await runner.run(pipeline, Book(pages=[Page(text=f"page {n}") for n in range(items)]), run_id=run_id)


async def _judge(state: Any) -> Any:
    await asyncio.sleep(0.02)
    return {"is_good": state.round > 2, "text": state.text}, 400, 35, "gpt-4o-mini"


async def _write(state: Any) -> Any:
    await asyncio.sleep(0.05)
    return {"text": state.text, "round": state.round + 1}, 900, 260, "gpt-4o"


_writer, _judge_node = _node("write", _write, Draft, Draft), _node("judge", _judge, Draft, Verdict)


@stroma_flow("letter", input=Draft, output=Draft)
async def letter(flow: Flow, state: Draft) -> Draft:
    for _ in range(4):
        state = await flow.step(_writer, state)
        if (await flow.step(_judge_node, state)).is_good:
            break
    await flow.wait_for(Approval, reason="Send the letter to Ada Lovelace?")
    return state


async def fill(store: SQLiteStore) -> None:
    """Make runs of every kind."""
    dice = random.Random(7)
    for number in range(46):
        pipeline = invoices(dice, breaks=number % 7 == 3)
        config = pipeline.config
        tags = ("nightly",) if number % 3 else ("backfill", "eu")
        runner = StromaRunner.quick(store=store, policy_map=config.policy_map, tags=tags)
        await runner.run(pipeline, Invoice(number=f"2026-{number:04}"))
    await make_map(store, 200, "book-200")
    await StromaRunner.quick(store=store, run_id="letter-1", tags=("mail",)).run(letter, Draft())
    asking = invoices(random.Random(1), asks=True)
    await StromaRunner.quick(store=store, run_id="asks-1").run(asking, Invoice())
    broken = invoices(random.Random(2), breaks=True)
    quick = StromaRunner.quick(
        store=store, run_id="fails-1", policy_map=broken.config.policy_map, tags=("nightly",)
    )
    await quick.run(broken, Invoice())
    runner = StromaRunner.quick(store=store)
    for number, options in enumerate[dict[str, Any]](
        ({"key": "eu-west", "priority": 5, "expires": 7200}, {})
    ):
        invoice = Invoice(number=f"2027-{number:04}")
        await runner.submit(
            invoices(dice), invoice, run_id=("queued-1", "later-1")[number], delay=600, **options
        )


async def submit_nothing(state: object, run_id: str) -> None:
    """Take part as what submits runs."""


def spread(path: Path, days: float = 6.5) -> None:
    """Move the runs of a store into the past, the oldest by so many days."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as db, db:
        runs = [row[0] for row in db.execute("SELECT run FROM runs WHERE run_id NOT LIKE '%-1' ORDER BY run")]
        for number, run in enumerate(runs):
            back = int(days * 86_400_000 * ((len(runs) - number) / len(runs)) ** 1.5)
            db.execute(
                "UPDATE runs SET started_ms = started_ms - ?, updated_ms = updated_ms - ? WHERE run = ?",
                (back, back, run),
            )
            db.execute("UPDATE tags SET started_ms = started_ms - ? WHERE run = ?", (back, run))
            for table in ("attempts", "steps"):
                db.execute(
                    f"UPDATE {table} SET started_ns = started_ns - ? WHERE run = ?", (back * 1_000_000, run)
                )


@contextlib.contextmanager
def living(store: SQLiteStore, run_id: str = "lives-1") -> Iterator[None]:
    """Hold a run at its fourth node, in another thread, until the end of the block."""
    ends = threading.Event()
    pipeline = invoices(random.Random(5), hangs=ends)
    runner = StromaRunner.quick(
        store=store, run_id=run_id, policy_map=pipeline.config.policy_map, tags=("nightly",)
    )
    thread = threading.Thread(target=lambda: asyncio.run(runner.run(pipeline, Invoice())))
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(60)


@dataclass
class Scenes:
    """Names of the runs that :func:`fill` made."""

    failed: str = "fails-1"
    asking: str = "asks-1"
    flow: str = "letter-1"
    map: str = "book-200"
    others: list[str] = field(default_factory=list)
