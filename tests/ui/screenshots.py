"""Pictures of the web interface, made in a real browser from runs made for them: ``./dev screenshots DIR``."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import BaseModel
from tests.ui.browser import Browser, find_chromium

from stroma import (
    FailurePolicy,
    NodeContract,
    Pipeline,
    RunConfig,
    SQLiteStore,
    StromaRunner,
    current_node,
    parallel,
    stroma_node,
)
from stroma.contracts import ContractRegistry
from stroma.contracts.checks.lineage import lineage_of
from stroma.contracts.node import find_node
from stroma.ui import Settings, make_app

SIZES = {"wide": (1280, 860), "narrow": (400, 860), "large": (2560, 1300)}


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


def _node(node_id: str, func: Any, input_model: type[BaseModel], output_model: type[BaseModel]) -> Any:
    contract: Any = NodeContract(node_id=node_id, input_schema=input_model, output_schema=output_model)
    return stroma_node(node_id, contract)(func)


def _pipeline(dice: random.Random, *, breaks: bool) -> Pipeline:
    async def fetch(state: Any) -> Any:
        await asyncio.sleep(0.03)
        return {"number": state.number, "pages": state.pages}

    async def extract(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0.02, 0.08))
        node = current_node()
        if node is not None and node.attempt == 1 and dice.random() < 0.6:
            node.report_usage(input_tokens=900, model="gpt-4o-mini")
            raise TimeoutError("the provider did not answer within 30 s")
        lines = [{"text": f"item {i}", "price": 12.5 * i} for i in range(1, 4)]
        return {"number": state.number, "lines": lines}, 1800, 420, "gpt-4o-mini"

    async def total(state: Any) -> Any:
        await asyncio.sleep(0.02)
        findings = {"number": state.number, "total": "75,00" if breaks else 75.0, "currency": "EUR"}
        return findings, 640, 60, "gpt-4o"

    async def page(state: Any) -> Any:
        await asyncio.sleep(dice.uniform(0.01, 0.05))
        return state, 300, 20, "gpt-4o-mini"

    quick = FailurePolicy(max_retries=3, backoff_seconds=0.08)
    nodes = [
        _node("fetch", fetch, Invoice, Invoice),
        parallel(_node("pages", page, Invoice, Invoice), _node("stamps", page, Invoice, Invoice)),
        _node("extract", extract, Invoice, Read),
        _node("total", total, Read, Total),
    ]
    return Pipeline("invoices", nodes, config=RunConfig(policy_map={"RECOVERABLE": quick}))  # type: ignore[dict-item]


async def _fill(store: SQLiteStore) -> None:
    dice = random.Random(7)
    for number in range(14):
        pipeline = _pipeline(dice, breaks=number % 5 == 3)
        runner = StromaRunner.quick(
            store=store, policy_map=pipeline.config.policy_map, tags=("nightly",) if number % 3 else ()
        )  # type: ignore[union-attr]
        await runner.run(pipeline, Invoice(number=f"2026-{number:04}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev screenshots", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the pictures go")
    directory: Path = parser.parse_args().directory
    program = find_chromium()
    if program is None:
        parser.error("there is no Chromium here; name it with CHROMIUM=")
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home,
        SQLiteStore(Path(home, "runs.db")) as store,
        socket.socket() as listening,
    ):
        asyncio.run(_fill(store))
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        pipeline = _pipeline(random.Random(7), breaks=False)
        picture = lineage_of(
            pipeline.name, [find_node(node) for node in pipeline.nodes], ContractRegistry()
        ).svg()
        settings = Settings(
            store=store,
            name="runs.db",
            hosts=[host],
            pipeline="invoices",
            resume=lambda run_id: None,
            lineage=picture,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(settings),
                log_level="warning",
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            with Browser(program) as browser:
                for path in shoot(browser, f"http://{host}", store, directory):
                    print(path)
        finally:
            server.should_exit = True
            thread.join()


def shoot(browser: Browser, url: str, store: SQLiteStore, directory: Path) -> list[Path]:
    """A picture of every page, light and dark, in every size."""
    failed = store.list_runs(status="FAILED", limit=1)[0].run_id
    good = store.list_runs(status="COMPLETED", limit=1)[0].run_id
    browser.size(1280, 860)
    browser.goto(f"{url}/run?id={failed}")
    attempt = browser.eval("[...document.querySelectorAll('[data-open]')].pop().getAttribute('href')")
    pages = {
        "runs": "/", "run": f"/run?id={failed}", "attempt": attempt, "compare": f"/compare?a={good}&b={failed}",
        "overview": "/overview?days=1", "pipeline": "/pipeline", "nothing": "/?q=nowhere",
    }  # fmt: skip
    outputs = []
    for name, path in pages.items():
        for size, (width, height) in SIZES.items():
            for dark in (False, True):
                browser.size(width, height, dark=dark)
                browser.goto(url + path)
                outputs.append(directory / f"{name}-{size}-{'dark' if dark else 'light'}.png")
                browser.screenshot(outputs[-1])
    assert not [problem for problem in browser.problems if not re.search("404", problem)], browser.problems
    return outputs


if __name__ == "__main__":
    main()
