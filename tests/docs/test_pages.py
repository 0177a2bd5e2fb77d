"""The pages under docs/ and the README: their code runs, their links lead somewhere and each has a place."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.docs.blocks import (
    ROOT,
    Shell,
    Wrong,
    blocks,
    of_page,
    promised,
    reader_env,
    run_lines,
    run_python,
    same,
    shown,
)
from tests.docs.killed_page import durable_program, kill_in_each_step
from tests.kit import environment
from tests.providers.replies import _CHAT, _MESSAGE
from tests.providers.server import Answer, Server
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import free_port
from tests.receivers.sentry import SentryServer
from tests.servers import shared_redis
from tests.servers_postgres import shared_postgres
from tests.telemetry import names
from tests.ui.browser import Browser, find_chromium
from tests.ui.page_tools import missing

from stroma.telemetry.metrics import METRICS, QUEUE_GAUGES

pytest_plugins = ["tests.receivers.fixtures"]
DOCS = ROOT / "docs"
#: Their code sets up what a process has once, so it runs in one of its own, beside a receiver of the system.
SYSTEMS = sorted((DOCS / "telemetry").glob("*.md"))
#: Beside a server.
SERVERS = [DOCS / "stores" / "postgres.md", DOCS / "stores" / "redis.md", DOCS / "temporal.md"]
#: In an environment that has the framework: tests/frameworks.
FRAMEWORKS = [
    *sorted(page for page in (DOCS / "adapters").glob("*.md") if page.stem != "any_framework"),
    *sorted((DOCS / "migration").glob("from-langgraph*.md")),
    DOCS / "migration" / "from-dbos.md",
]
#: In the environment of the examples: tests/examples.
FASTAPI = [DOCS / "howto" / "approval-service.md", DOCS / "howto" / "start-from-a-request.md"]
#: Followed as a whole, by tests/docs/test_tutorial.py.
TUTORIAL = sorted((DOCS / "tutorial").glob("*.md"))
#: Beside a provider of models.
README = ROOT / "README.md"
ALL = [README, *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in ALL if page not in {README, *SYSTEMS, *SERVERS, *FRAMEWORKS, *FASTAPI, *TUTORIAL}]
#: What shows as it is: outputs, and forms of commands with words in place of values.
SHOWN_ONLY = {"", "diff", "html", "text", "ini", "yaml", "json", "toml"}


def compare(text: str, name: str, ran: list[tuple[int, str, list[str]]]) -> int:
    """Whether the blocks of a page printed what the page says that they print."""
    below = shown(text)
    for line, code, printed in ran:
        expected = below.get(line) or promised(code)
        if expected and not same(printed, expected):
            raise Wrong(f"{name}, the block at line {line}: it printed {printed}, the page shows {expected}")
    return len(ran)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block and every shell line of the README and the docs runs as the page says."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    ran = compare(text, page.name, list(run_python(text, page.stem)))
    assert ran >= {"migration": 9, "providers": 1, "prices": 7}.get(page.stem, 0)
    if any(block.language == "console" for block in of_page(text)):
        run_lines(text, page.stem, tmp_path, reader_env())


def test_the_readme_runs_beside_a_provider(tmp_path: Path, provider: Server) -> None:
    """The README's programs call a provider that refuses once, then errs once, and print its output."""
    text = README.read_text("utf-8")
    assert compare(text, "README", list(run_python(text, "README"))) == 1
    refused = Answer(429, {"error": {"message": "Too many requests"}}, {"retry-after-ms": "10"})
    base = provider.url(refused, _chat({"euros": "twelve"}), _chat({"euros": 12}))
    env = reader_env() | {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": "any"}
    run_lines(text, "README", tmp_path, env)
    (flow,) = (block for block in of_page(text) if block.title == "instalments.py")
    with Shell(tmp_path, env) as shell:
        assert shell.run("python instalments.py") == (0, promised(flow.text))


def _chat(answer: object) -> Answer:
    """A completion of OpenAI with this answer, as JSON text."""
    message = {"role": "assistant", "content": json.dumps(answer)}
    return Answer(body={**_CHAT, "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def test_the_durable_program_of_any_framework_continues_where_it_was_killed(tmp_path: Path) -> None:
    """G5: Killed with SIGKILL in one step after the other, and started again, the program on the page about
    frameworks without a page ends as without kills, and calls no step again that was recorded."""
    kill_in_each_step(durable_program(DOCS / "adapters" / "any_framework.md"), tmp_path)


@pytest.mark.parametrize("page", sorted((DOCS / "adapters").glob("*.md")), ids=lambda page: page.stem)
def test_the_page_of_a_framework_has_a_durable_program(page: Path) -> None:
    """It is killed and continued in the environment of the framework."""
    assert durable_program(page)


def test_every_page_whose_code_shows_anything_is_run() -> None:
    """No page is left out, no block is of a kind that nothing runs, and no output is left empty."""
    assert len(TUTORIAL) == 11
    assert len([page for page in PAGES if page.parent.name == "howto"]) > 20
    for page in ALL:
        text = page.read_text("utf-8")
        for block in of_page(text):
            parsed = {"sh"} if page.name == "temporal.md" else set()  # By tests/docs/test_temporal_page.py.
            assert block.language in {"python", "console", *SHOWN_ONLY, *parsed}, (
                f"{page.name}, line {block.line}"
            )
            assert block.text.strip(), (
                f"{page.name}, line {block.line}: write it with ./dev run python -m tests.docs.blocks {page}"
            )
            typed = re.search(r"^\$ ", block.text, re.MULTILINE)
            assert not typed or block.language == "console", (
                f"{page.name}, line {block.line}: nobody types this"
            )
        # In Python an unclosed block would swallow the rest of the page.
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) % 2 == 0, page.name


@pytest.mark.parametrize(
    ("code", "error"),
    [("print(1)  # 2\n", Wrong), ("1 / 0\n", ZeroDivisionError), ("import nothing\n", ImportError)],
)
def test_code_that_does_not_do_what_it_says_is_found(code: str, error: type[Exception]) -> None:
    """The test above fails for a block that raises or prints something else."""
    text = f"text\n\n```python\n{code}```\n"
    with pytest.raises(error):
        compare(text, "wrong", list(run_python(text, "wrong")))


def test_output_below_a_block_is_compared() -> None:
    """What stands in a block of its own below is what the code prints, but for times and the like."""
    text = "```python\nprint('took 0.1 s')\nprint(2)\n```\n\n```\ntook 7 s\n{}\n```\n"
    for printed, right in ((2, True), (3, False)):
        page = text.format(printed)
        if right:
            assert compare(page, "page", list(run_python(page, "page"))) == 1
        else:
            with pytest.raises(Wrong):
                compare(page, "page", list(run_python(page, "page")))


#: Runs the blocks of the page argv[1], and says in argv[2] what each has printed.
ALONE = """
import json, sys
from tests.docs.blocks import run_python
with open(sys.argv[1]) as file:
    text = file.read()
sys.path.remove(sys.argv[3])
with open(sys.argv[2], "w") as file:
    json.dump(list(run_python(text, "page")), file)
"""


def run_alone(page: Path, tmp_path: Path, env: Mapping[str, str], *replaced: tuple[str, str]) -> int:
    """Run the blocks of a page in a process of its own, and compare what they print."""
    text = page.read_text("utf-8")
    value, instance = tmp_path / "page.md", tmp_path / "printed.json"
    value.write_text(functools.reduce(lambda code, pair: code.replace(*pair), replaced, text))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, value, instance, str(ROOT)],
        env={**environment(), **env, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    ran = json.loads(instance.read_text())
    return compare(text, page.name, [(line, code, printed) for line, code, printed in ran])


def test_the_code_about_opentelemetry(tmp_path: Path, otlp: OtlpReceiver) -> None:
    """docs/telemetry/opentelemetry.md runs, and its spans reach a receiver."""
    page = DOCS / "telemetry" / "opentelemetry.md"
    assert run_alone(page, tmp_path, {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url}) == 3
    assert otlp.span("stroma.node tone")["attributes"]["stroma.outcome"] == "success"


def test_the_code_about_prometheus(tmp_path: Path) -> None:
    """docs/telemetry/prometheus.md runs, on another port than it says."""
    page = DOCS / "telemetry" / "prometheus.md"
    assert run_alone(page, tmp_path, {}, ("9464", str(free_port()))) == 2


def test_the_code_about_datadog(tmp_path: Path, datadog_agent: DatadogAgent, statsd: StatsdSocket) -> None:
    """docs/telemetry/datadog.md runs, and its spans and metrics reach the agent."""
    page = DOCS / "telemetry" / "datadog.md"
    replaced = ("localhost:8125", f"{statsd.host}:{statsd.port}")
    assert run_alone(page, tmp_path, datadog_agent.environment(), replaced) == 2
    (trace,) = datadog_agent.traces(at_least=1)
    assert sorted(span["resource"] for span in trace) == ["draft", "letters", "read.template"]
    assert {"stroma.runs", "stroma.cost_usd"} <= {line.name for line in statsd.statistics()}


def test_the_code_about_sentry(tmp_path: Path, sentry_server: SentryServer) -> None:
    """docs/telemetry/sentry.md runs, and makes the one issue that it speaks of."""
    page = DOCS / "telemetry" / "sentry.md"
    assert run_alone(page, tmp_path, {"SENTRY_DSN": sentry_server.dsn}) == 2
    (event,) = sentry_server.events
    assert event["fingerprint"] == ["stroma", "letters", "draft", "AMBIGUOUS", "PermissionError"]
    assert event["tags"]["language"] == "en"


def test_the_code_about_logs(tmp_path: Path) -> None:
    """docs/telemetry/logs.md runs, and prints what it shows."""
    assert run_alone(DOCS / "telemetry" / "logs.md", tmp_path, {}) == 3


def test_every_system_has_a_page() -> None:
    """Each exporter has a page, whose code is run above, with a picture or lines of what one sees."""
    assert [page.stem for page in SYSTEMS] == ["datadog", "logs", "opentelemetry", "prometheus", "sentry"]
    for page in SYSTEMS:
        text = page.read_text("utf-8")
        assert f"test_the_code_about_{page.stem}" in globals()
        assert "## Questions" in text
        assert "How do I alert on final failures only?" in text
        seen = text.partition("## Example output")[2]
        assert "![" in seen or page.stem == "logs"
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < 150_000


def labels_on(page: str, column: int) -> dict[str, set[str]]:
    """The labels of each metric of a page's table."""
    text = (DOCS / "telemetry" / f"{page}.md").read_text("utf-8")
    (table,) = re.findall(r"^\| metric .*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [line.split(" | ") for line in table.splitlines()]
    return {row[0].strip("| `"): set(re.findall(r"`([^`]+)`", row[column])) for row in rows}


def test_metrics_on_the_pages_are_those_that_there_are() -> None:
    """The tables of the pages have every metric with its labels, and no other."""
    assert labels_on("prometheus", 2) == {name: set(labels) for name, (_, labels) in names.PROMETHEUS.items()}
    assert labels_on("datadog", 2) == {name: set(labels) for name, (_, labels) in names.DATADOG.items()}
    outputs = {metric.otel for metric in (*METRICS, *QUEUE_GAUGES) if metric.otel}
    assert set(labels_on("opentelemetry", 2)) == outputs
    overview = (DOCS / "telemetry.md").read_text("utf-8")
    assert [
        name for name in outputs | {*names.PROMETHEUS, *names.DATADOG} if f"`{name}`" not in overview
    ] == []


def test_names_of_spans_in_the_overview_are_those_that_there_are() -> None:
    """ "The names" in docs/telemetry.md has exactly the names that OpenTelemetry, Datadog and Sentry get."""
    folder = ROOT / "src" / "stroma" / "telemetry"
    shared = [folder / f"{name}.py" for name in ("conventions", "inference", "attribution", "metrics")]
    sources = [
        *shared,
        *(path for name in ("opentelemetry", "datadog", "sentry") for path in (folder / name).glob("*.py")),
    ]
    family = r"(?:stroma|gen_ai|openinference|llm|session|user|usr|input|output|error|operation)"
    # A dot at the end: the beginning of names that are looked for.
    code = "\n".join(path.read_text("utf-8") for path in sources)
    for direction in ("input", "output"):
        code += code.replace("{direction}", direction)
    written = set(re.findall(rf'"({family}\.[a-z_.]*[a-z_])"', code))
    written |= {f"stroma.{name}" for name in re.findall(r'\("(?:stroma\.)?((?:run|node)\.id)", ', code)}
    written.discard("openinference.instrumentation.langchain")  # A scope.
    section = (DOCS / "telemetry.md").read_text("utf-8").partition("## The names")[2].partition("\n## ")[0]
    listed = set(re.findall(rf"`({family}\.[a-z_.]+)`", section)) - {"stroma.temporal"}  # A module.
    assert sorted(written - listed) == []
    assert (
        sorted(name for name in listed if name not in code and name.removeprefix("stroma.") not in code) == []
    )


def test_lines_on_the_page_about_logs_are_those_that_there_are() -> None:
    """Each line that log_hooks writes is in the table."""
    source = (ROOT / "src" / "stroma" / "telemetry" / "logs.py").read_text("utf-8")
    written = set(re.findall(r'"((?:run|node|budget|circuit|limit) [\w ]+)"', source))
    written |= {f"node {outcome}" for outcome in names.VALUES["outcome"]}
    page = (DOCS / "telemetry" / "logs.md").read_text("utf-8")
    assert len(written) > 8
    assert [name for name in written if f"`{name}`" not in page] == []


def test_the_code_about_postgres(tmp_path: Path) -> None:
    """docs/stores/postgres.md runs, on a server."""
    server = shared_postgres()
    schema = f"docs_{tmp_path.name.replace('-', '_')}"
    replaced = ("postgresql://app@localhost/app", server.dsn), ('schema="stroma"', f'schema="{schema}"')
    try:
        assert run_alone(SERVERS[0], tmp_path, {}, *replaced) == 1
    finally:
        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


def test_the_code_about_redis(tmp_path: Path) -> None:
    """docs/stores/redis.md runs, on a server."""
    server = shared_redis()
    server.execute("FLUSHALL")
    assert run_alone(SERVERS[1], tmp_path, {}, ("redis://localhost:6379/0", server.url)) == 1


def loaded(name: str) -> Any:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"stroma_docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> Any:
    return loaded("build")


@pytest.fixture(scope="module")
def look() -> Any:
    return loaded("look")


def slug(heading: str) -> str:
    """The anchor of a heading, as the repository and the site make it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


@functools.cache
def anchors(path: Path) -> set[str]:
    """What a link to a file may name: a heading, a name that its docstring is put to, a function."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
        return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    findings: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        findings[slug(heading)] = findings.get(slug(heading), 0) + 1
    return {f"{name}_{n}" if n else name for name, times in findings.items() for n in range(times)} | set(
        re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    )


def links_of(text: str) -> list[str]:
    """The links and pictures of a page that stay in the repository, code left out."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text)


@pytest.mark.parametrize(
    "page", sorted({*ALL, *ROOT.glob("*.md")}), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file, and to a heading, a name or a function in it."""
    for target in links_of(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_pages_link_to_each_other() -> None:
    """The test above has something to look at."""
    assert sum(len(links_of(page.read_text("utf-8"))) for page in ALL) > 400


def test_every_page_has_a_place_in_the_site(build: Any) -> None:
    """The navigation has each page once, by what readers do; only the architecture page links decisions."""
    nav = build.navigation({*build.pages(), "adr/index.md"})
    places = [name for names in nav.values() for name in names]
    assert sorted(places) == sorted(name for name in build.pages() if not name.startswith("adr/"))
    assert nav.get("More", []) == [], "give it a line in NAV of docs/build.py"
    sections = dict.fromkeys(name.partition("/")[0] for name in nav)
    assert [*sections] == ["Start", "Tutorial", "How-to", "Concepts", "Integrations", "Reference", "Project"]
    architecture = (DOCS / "architecture.md").read_text("utf-8")
    assert [adr.name for adr in (DOCS / "adr").glob("*.md") if f"(adr/{adr.name})" not in architecture] == []


def test_every_page_has_one_title_and_its_headings_in_order() -> None:
    """A page begins with its only heading of the first level, and no level is left out on the way down."""
    for page in ALL:
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        # A name in the reference becomes a heading of the second level.
        text = re.sub(r"^::: ", "## ", text, flags=re.MULTILINE)
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        assert levels[:1] == [1], page
        assert levels.count(1) == 1, page
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), page


@pytest.mark.slow
def test_the_search_starts_its_worker_from_the_disk(build: Any, tmp_path: Path) -> None:
    """A page opened from the disk reads the index and has answers without the worker of a server."""
    program = find_chromium()
    if program is None:
        missing("there is no Chromium here; name it with CHROMIUM=")
    assert program is not None
    index = json.dumps({"items": [{"title": "</script> \u2028 {braces}"}]})
    worker = "onmessage = (event) => postMessage(event.data + ' answered')"
    (tmp_path / "search.js").write_text(build.search_script(index, worker), "utf-8")
    for name, script in (("with.html", '<script src="search.js"></script>'), ("without.html", "")):
        (tmp_path / name).write_text(f"<!doctype html><html lang=en><title>x</title>{script}</html>", "utf-8")
    ask = """new Promise((resolve) => {
      try {
        const worker = new Worker(new URL("assets/javascripts/workers/search.0.min.js", location.href))
        worker.onmessage = (event) => resolve(event.data)
        worker.onerror = () => resolve("refused")
        worker.postMessage("question")
      } catch (error) { resolve("refused") }
    })"""
    with Browser(program) as browser:
        browser.goto((tmp_path / "without.html").as_uri())
        assert browser.eval(ask) == "refused"
        browser.goto((tmp_path / "with.html").as_uri())
        assert browser.eval("__index.items[0].title") == "</script> \u2028 {braces}"
        assert browser.eval(ask) == "question answered"


def test_links_in_the_site_lead_to_pages_of_the_site(build: Any, tmp_path: Path) -> None:
    """What is laid out has links among its own files alone: to pages, pictures, and sources as pages."""
    nav = build.lay_out(tmp_path)
    laid = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for names in nav.values() for name in names} <= laid
    assert "source/tests/hooks/test_hooks.py.md" in laid
    seen = 0
    for name in laid:
        if name.endswith(".md") and not name.startswith("source/"):
            for target in links_of((tmp_path / name).read_text("utf-8")):
                there = (tmp_path / name).parent / target.partition("#")[0]
                assert (
                    target.startswith("#")
                    or there.resolve().relative_to(tmp_path.resolve()).as_posix() in laid
                ), (name, target)
                seen += 1
    assert seen > 400


def test_the_landing_page_shows_a_failure_handled_in_twenty_lines() -> None:
    """Its first block is at most twenty lines of code; its output has a failure and a completed run."""
    first, output = of_page((DOCS / "index.md").read_text("utf-8"))[:2]
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 20
    assert "RECOVERABLE" in output.text
    assert "COMPLETED" in output.text


def test_the_readme_is_short_and_in_order() -> None:
    """The README has at most 179 lines: the problem, the demo, the installation, a call of a model, flows,
    hooks, next steps, guarantees, when not to use it, figures."""
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 179
    first, *headings = re.findall(
        r"^(?:## |!\[)(.+?)(?:\]|$)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    assert "demo" in first
    assert headings == [
        "Install",
        "One example",
        "Flows",
        "Hooks",
        "The page of a run",
        "Next steps",
        "Guarantees",
        "When not to use it",
        "Measurements",
    ]


def test_the_nodes_that_call_providers(tmp_path: Path, provider: Server) -> None:
    """The nodes of the page read answers, usage and models from responses of the real clients."""
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI

    (_, code), *_ = blocks((DOCS / "howto" / "call-a-provider.md").read_text("utf-8"))
    (tmp_path / "ratings.py").write_text(code)
    page = runpy.run_path(str(tmp_path / "ratings.py"))
    clients = page["Clients"](
        openai=AsyncOpenAI(base_url=provider.url(_chat({"stars": 5})), api_key="any"),
        anthropic=AsyncAnthropic(base_url=provider.url(Answer(body=_MESSAGE)), api_key="any"),
    )
    nodes, review = [page["rate"], page["reply"]], page["Review"](text="I like it.")
    result = page["runner"].run_sync(nodes, review, context=clients)
    result.raise_for_status()
    assert result.final_state == page["Reply"](text='{"text": "hi"}')
    assert [event.usage.model for event in result.trace] == [_CHAT["model"], _MESSAGE["model"]]
    assert result.total_tokens == 1230 + 1270


def test_each_howto_has_a_situation_code_and_limits() -> None:
    """A how-to starts with a sentence about the situation, then shows code, and ends with its limits."""
    for page in sorted((DOCS / "howto").glob("*.md")):
        if page.stem != "index":
            text = page.read_text("utf-8")
            situation = text.split("\n\n")[1]
            assert re.match(r"[A-Z][^#|`]+[.,:]", situation), page.name
            assert 0 < text.index("```") < text.index("\n## Limits\n"), page.name


def test_each_guarantee_is_held_by_tests_that_name_it() -> None:
    """Each guarantee is on its page, with at least two tests."""
    text = (DOCS / "guarantees.md").read_text("utf-8")
    assert re.findall(r"^## (G\d+)$", text, re.MULTILINE) == [f"G{n}" for n in range(1, 14)]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        number, _, rest = section.partition("\n")
        named = re.findall(r"\.\./(tests/[\w/]+\.py)#(\w+)\)", rest)
        assert len(named) >= 2, number
        for path, name in named:
            assert name in anchors(ROOT / path), (path, name)


def test_every_public_name_is_in_the_reference() -> None:
    """What can be imported from stroma and its public packages has a place, with its docstring, on a page."""
    import stroma
    import stroma.adapters
    import stroma.checkpoint
    import stroma.telemetry
    import stroma.testing

    index = (DOCS / "reference" / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^\| \[(\w+)\]", index, re.MULTILINE))
    for package in (stroma, stroma.adapters, stroma.checkpoint, stroma.telemetry, stroma.testing):
        public = {name for name in package.__all__ if not name.startswith("_")}
        assert public - listed == set(), package.__name__


def test_every_command_is_in_the_reference() -> None:
    """Each command has its section with options, and a line on the page that tells how they are used."""
    from stroma.cli.app import app

    text = (DOCS / "reference" / "commands.md").read_text("utf-8")
    report = (DOCS / "cli.md").read_text("utf-8")
    for name in app.list_commands(None):
        assert f"\n## stroma {name}\n" in text, name
        assert f"| `stroma {name}" in report, name


def test_every_json_object_is_on_its_page() -> None:
    """Each schema that a command prints has a section, and each field of a run is named in that of `runs`."""
    from stroma.checkpoint.records import RunRecord
    from stroma.cli.commands.runs import run_data

    sources = [path.read_text("utf-8") for path in (ROOT / "src" / "stroma" / "cli").rglob("*.py")]
    schemas = set(re.findall(r"\bstroma\.[a-z_-]+/\d+", "".join(sources)))
    _, *sections = (DOCS / "json.md").read_text("utf-8").split("\n## ")
    assert (
        schemas - set(re.findall("`([^`]+)`", "".join(one.partition("\n")[0] for one in sections))) == set()
    )
    (of_runs,) = (one for one in sections if one.startswith("`stroma.runs/1`"))
    fields = run_data(RunRecord("r", "p", "FAILED", 1, 0, 0, 0, 0.0, 0, None))
    assert fields.keys() - set(re.findall(r"`(\w+)`", of_runs)) == set()


def test_pages_quote_commands_and_options_that_exist() -> None:
    """Each `stroma COMMAND --option` on a page or in a message of the package is one of the command line."""
    import click

    from stroma.cli.app import app

    context, seen, wrong = click.Context(app), 0, []
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    for path in [*ALL, ROOT / "examples" / "README.md", *sources]:
        for name, rest in re.findall(
            r"(?<![\w./@-])stroma ([a-z][\w-]*)([^`\n|&;]*)", path.read_text("utf-8")
        ):
            command = app.get_command(context, name)
            if command is None:  # Prose.
                continue
            seen += 1
            inner = getattr(command, "commands", {}).values()
            known = {one for each in (app, command, *inner) for param in each.params for one in param.opts}
            options = set(re.findall(r"(?<![\w'\"{])--[a-z][\w-]*", rest)) - known - {"--help"}
            wrong += [f"{path.name}: stroma {name} {one}" for one in options]
    assert wrong == []
    assert seen > 300


def test_pictures_say_in_words_what_they_show() -> None:
    """Every picture of a concept is drawn by the script, with a title and texts for those who cannot see."""
    pictures = loaded("pictures")
    drawn = {f"{picture.name}.svg": picture.svg() for picture in (draw() for draw in pictures.PICTURES)}
    folder = DOCS / "images" / "concepts"
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == drawn, (
        "./dev run python docs/pictures.py"
    )
    for text in drawn.values():
        tree = ElementTree.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        assert [
            len(tree.findtext(f"{space}{tag}") or "") > length for tag, length in (("title", 5), ("desc", 80))
        ] == [True, True]
        assert "prefers-color-scheme: dark" in text
        assert "href" not in text.replace("markdown", "")
    for page in ALL:
        for alternative, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text("utf-8")):
            assert len(alternative) > 10, (page.name, target)


BROKEN = """<html lang="en"><head><link rel="stylesheet" href="https://elsewhere.example/a.css"></head><body><main>
<h1 id="top">A page</h1><h3>Too deep</h3><img src="a.png"><a href="gone.html">a</a>
<a href="#gone">b</a><a href="#top">c</a>
<script src="//elsewhere.example/a.js"></script></main></body></html>"""


def test_the_look_at_the_site_finds_what_is_wrong(look: Any, tmp_path: Path) -> None:
    """Find links and anchors to nothing, foreign resources, pictures without a text, and skipped levels."""
    (tmp_path / "page.html").write_text(BROKEN)
    result = look.read(tmp_path)
    assert result == [
        "page.html: an image without a text: a.png",
        "page.html: a heading of level 3 follows one of level 1",
        "page.html: it loads https://elsewhere.example/a.css",
        "page.html: it loads //elsewhere.example/a.js",
        "page.html: a broken link: gone.html",
        "page.html: a link to a missing anchor: #gone",
    ]
    (tmp_path / "page.html").write_text('<html lang="en"><main><h1>A page</h1><h2>More</h2></main></html>')
    assert look.read(tmp_path) == []
