"""What the tests of tracing backends share: an agent that meets what backends get wrong, and a server."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from pydantic import BaseModel
from tests.npm import missing

from stroma import FailureClass, FailurePolicy, Flow, SQLiteStore, StromaRunner, Usage, current_node, parallel
from stroma.telemetry import otel_hooks

ROOT = Path(__file__).parents[2]
SMALL, LARGE = "gpt-4o-mini", "gpt-4o"
#: Seconds that a server may take to start on a busy machine, and to show what it has received.
START, SHOW = 240, 60

RUN, RESEARCH, READ = "invoke_workflow support", "invoke_workflow researcher", "stroma.map read"
CHECKS = "stroma.node parallel(tone, language)"
#: (name, name of the parent) of every span before the first judgement, which is where the run is forked.
_BEGINNING = [
    ("stroma.node classify", RUN),
    *[(f"chat {SMALL}", "stroma.node classify")] * 2,
    (CHECKS, RUN),
    *[(f"stroma.node {check}", CHECKS) for check in ("tone", "language")],
    *[(f"chat {SMALL}", f"stroma.node {check}") for check in ("tone", "language")],
    (RESEARCH, RUN),
    ("execute_tool search", RESEARCH),
    (READ, RESEARCH),
    *[("stroma.node read", READ)] * 3,
    *[("chat by the client", "stroma.node read")] * 3,
    ("stroma.node draft", RUN),
    (f"chat {LARGE}", "stroma.node draft"),
]
_JUDGEMENT = [("stroma.node judge", RUN), (f"chat {SMALL}", "stroma.node judge")]
_REST = [*_JUDGEMENT, ("stroma.node draft", RUN), (f"chat {LARGE}", "stroma.node draft"), *_JUDGEMENT]
#: The same of the three runs: one that was killed and resumed, its fork, and one whose key was refused.
TREE = sorted(
    [
        *[(RUN, None)] * 3,
        *_BEGINNING,
        *[*_REST, ("stroma.node send", RUN)] * 2,
        ("stroma.node classify", RUN),
    ],
    key=str,
)

T = TypeVar("T")


class Ticket(BaseModel):
    text: str = "Where is order 4711?"


class Label(BaseModel):
    topic: Literal["order", "refund"]


class Page(BaseModel):
    number: int
    text: str = ""


class Pages(BaseModel):
    pages: list[Page]


class Letter(BaseModel):
    text: str
    version: int = 1
    is_good: bool = False


class ProviderError(Exception):
    """An answer of a provider that is not a 200."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


class Sent(NamedTuple):
    """What the journal says that the runs used."""

    tokens: int
    cost_usd: float


class Endpoint(NamedTuple):
    """Where spans go, by OTLP over HTTP."""

    url: str
    headers: Mapping[str, str]
    resource: Mapping[str, str]


def support_of(runner: StromaRunner, client: Any, before_sending: Callable[[], None]) -> Any:
    """Return an agent: it repairs an answer, checks at once, has another flow read pages, of which one is
    refused at first, drafts until a judge is content, and sends."""

    @runner.node("classify", input=Ticket, output=Label)
    async def classify(ticket: Ticket) -> Any:
        if current_node().run_id == "refused":
            raise ProviderError(401)
        topic = "order" if current_node().last_failure else "an order"
        return {"topic": topic}, Usage(500, 50, model=SMALL)

    @runner.node("tone", input=Ticket, output=Ticket)
    async def tone(ticket: Ticket) -> Any:
        return ticket, Usage(9, 1, model=SMALL)

    @runner.node("language", input=Ticket, output=Ticket)
    async def language(ticket: Ticket) -> Any:
        return ticket, Usage(8, 1, model=SMALL)

    @runner.node("search", input=Ticket, output=Pages, role="tool")
    async def search(ticket: Ticket) -> Pages:
        return Pages(pages=[Page(number=number) for number in (1, 2, 3)])

    @runner.node("read", input=Page, output=Page)
    async def read(page: Page) -> Any:
        if page.number == 2 and current_node().attempt == 1:
            raise ProviderError(429)
        with client.start_as_current_span("chat by the client") as span:
            span.set_attributes(
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "openai",
                    "gen_ai.request.model": SMALL,
                    "gen_ai.response.model": SMALL,
                    "gen_ai.usage.input_tokens": 7,
                    "gen_ai.usage.output_tokens": 3,
                }
            )
        return Page(number=page.number, text="It left on Monday."), Usage(7, 3, model=SMALL)

    @runner.node("draft", input=Letter, output=Letter)
    async def draft(letter: Letter) -> Any:
        words = ["Your ", "order ", "left ", "on Monday."]
        for word in words:
            current_node().emit(word)
        return Letter(text="".join(words), version=letter.version), Usage(900, 80, 100, 0, model=LARGE)

    @runner.node("judge", input=Letter, output=Letter)
    async def judge(letter: Letter) -> Any:
        good = letter.version == 2
        return letter.model_copy(update={"is_good": good}), Usage(100, 5, model=SMALL)

    @runner.node("send", input=Letter, output=Letter)
    async def send(letter: Letter) -> Letter:
        before_sending()
        return letter

    @runner.flow("researcher", input=Ticket, output=Pages)
    async def researcher(flow: Flow, ticket: Ticket) -> Pages:
        return Pages(pages=await flow.map(read, (await flow.step(search, ticket)).pages))

    @runner.flow("support", input=Ticket, output=Letter)
    async def support(flow: Flow, ticket: Ticket) -> Letter:
        await flow.step(classify, ticket)
        await flow.step(parallel(tone, language), ticket)
        pages = await flow.run(researcher, ticket)
        for version in (1, 2, 3):
            letter = await flow.step(draft, Letter(text=pages.pages[0].text, version=version))
            letter = await flow.step(judge, letter)
            if letter.is_good:
                break
        return await flow.step(send, letter)

    return support


async def run_support(endpoint: Endpoint, folder: Path, *, dies: bool) -> Sent:
    """Run the agent, which may be killed when it sends; if it is not, fork it, and run it with a bad key."""
    provider = TracerProvider(resource=Resource.create(dict(endpoint.resource)))
    exporter = OTLPSpanExporter(endpoint=endpoint.url, headers=dict(endpoint.headers), timeout=SHOW)
    provider.add_span_processor(BatchSpanProcessor(exporter))

    def before_sending() -> None:
        if dies:
            assert provider.force_flush()
            os.kill(os.getpid(), signal.SIGKILL)

    about: dict[str, Any] = {"conversation": "thread-17", "user": "ada"}
    async with SQLiteStore(folder / "runs.db") as store:
        runner = StromaRunner.quick(
            hooks=otel_hooks(tracer=provider, content="redacted"),
            store=store,
            policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0)},
            tags=("beta",),
            contract_retries={"classify": 1},
            lease_seconds=0.5,
        )
        support = support_of(runner, provider.get_tracer("client"), before_sending)
        first = await runner.run(support, Ticket(), run_id="r-1", resume=True, **about)
        forked = await runner.fork("r-1", support, at="judge", new_run_id="fork", **about)
        refused = await runner.run(support, Ticket(), run_id="refused", **about)
        ends = [str(result.status) for result in (first, forked, refused)]
        assert ends == ["RESUMED", "RESUMED", "FAILED"], ends
        assert await runner.flush(timeout_seconds=2 * SHOW)
        records = store.list_runs()
    provider.shutdown()
    return Sent(sum(run.tokens for run in records), sum(run.cost_usd for run in records))


def send_runs(endpoint: Endpoint, folder: Path) -> Sent:
    """Send three runs: one that is killed and resumed, its fork, and one whose key is refused."""
    code = "import json, sys; from tests.frameworks import backends; backends.die(*json.loads(sys.argv[1]))"
    about = json.dumps([endpoint, str(folder)])
    done = subprocess.run([sys.executable, "-c", code, about], cwd=ROOT, check=False, timeout=START)
    assert done.returncode == -signal.SIGKILL
    return asyncio.run(run_support(endpoint, folder, dies=False))


def die(endpoint: Any, folder: str) -> None:
    """Be the process that is killed."""
    asyncio.run(run_support(Endpoint(*endpoint), Path(folder), dies=True))


def shoot(url: str, name: str, home: Path) -> None:
    """Take a picture of a page, as users of the backend see it, into ``build/backends``."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        missing("there is no Chromium here; name it with CHROMIUM=")
    assert chromium is not None
    folder = ROOT / "build" / "backends"
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}.png"
    picture.unlink(missing_ok=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,2000"]
    options += [f"--screenshot={picture}", f"--user-data-dir={home}", "--force-prefers-reduced-motion"]
    options += ["--virtual-time-budget=60000"]  # A busy machine takes a panel half-way in after 20 s.
    subprocess.run([chromium, *options, url], check=True, capture_output=True, timeout=4 * SHOW)
    assert picture.stat().st_size > 20_000, "the page is empty"


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(program: str, *arguments: str, home: Path, ready: str, **environment: str) -> Iterator[None]:
    """Run a program of this environment until the address ``ready`` answers, and end it afterwards."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    env = {**os.environ, "DO_NOT_TRACK": "true", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    output = home / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdout=file, stderr=file, start_new_session=True
        )
    try:

        def is_up() -> bool:
            assert process.poll() is None, output.read_text()[-3000:]
            try:
                with urllib.request.urlopen(ready, timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        assert eventually(is_up, START), output.read_text()[-3000:]
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def eventually(value: Callable[[], T], seconds: float = SHOW) -> T:
    """Return the first true value, or the last one when the time is up."""
    deadline = time.monotonic() + seconds
    while not (found := value()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
