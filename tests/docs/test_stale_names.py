"""Names and figures in docstrings, comments and pages: each is that of the code."""

import ast
import builtins
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.docs.blocks import ROOT

#: An identifier, dotted or called: `f()`, `A.b`, `f(x, ...)`.
EXPRESSION = re.compile(r"[\w.~]+(?:\(.*\))?")
MENTIONS = re.compile(r"``([^`]+)``|:\w+:`([^`]+)`|\b((?:\w+\.)*\w+)\(\)|\b(stroma(?:\.\w+)+)")


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w+", text))


#: Names of other libraries, of environment variables and of programs that pages and docstrings mention.
FOREIGN = words("""
    AGENT ANTHROPIC_API_KEY AgentFrameworkToOpenInferenceProcessor BGREWRITEAOF Base64Str DD_ENV
    DD_VERSION Evaluate HttpAgent LLMMetadataExtractor LLMResult MyProgram MyWorkflow OPENAI_BASE_URL
    OTEL_EXPORTER_OTLP_HEADERS OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT
    OpenAIConversationsSession PGPASSFILE QueueHandler RetryError Router SENTRY_ENVIRONMENT
    StringConstraints TEMPORAL_CONFIG_FILE TEMPORAL_TLS_CLIENT_CERT_PATH TOOL TaskGroup
    TripFlow as_tool asyncify backoff_factor
    before_sleep confirm
    conversation_id create_agent create_deep_agent create_sdk_mcp_server event_stream_handler
    failure_error_function field_serializer include_partial_messages increase is_enabled make_asgi_app
    max_interval parallel_a__b_ push_to_gateway retry_if_result set_exc_info stop_after_delay
    stream_gen_ai_spans streamify to_regclass useChat wait_fixed wait_random wait_random_exponential
    set_threshold
""")


def docstrings(source: str) -> dict[int, str]:
    """The docstrings of a module by the number of their first line."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text = (
                first.value.value
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                else None
            )
            if isinstance(text, str):
                found[first.lineno] = text
    return found


@cache
def read_source() -> tuple[set[str], list[tuple[str, str]]]:
    """The names in the code of the package, and its docstrings and comments with their places."""
    names, texts = set(dir(builtins)) | {"stroma"}, []
    for path in (ROOT / "src").rglob("*.py"):
        source = path.read_text("utf-8")
        docs = docstrings(source)
        texts += [(f"{path.relative_to(ROOT)}:{line}", text) for line, text in docs.items()]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                texts.append((f"{path.relative_to(ROOT)}:{token.start[0]}", token.string))
            elif token.start[0] not in docs:
                names |= words(token.string)
        names.add(path.stem)
        names.add(path.parent.name)
    return names, texts


def pages() -> Iterator[tuple[Path, str]]:
    """The pages that describe what is there now."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        if path.name != "CHANGELOG.md" and path.parent.name != "adr":
            yield path.relative_to(ROOT), path.read_text("utf-8")


def test_docstrings_and_comments_name_what_is_there() -> None:
    """A name in a docstring or a comment of the package is a name in its code."""
    names, texts = read_source()
    stale = []
    for place, text in texts:
        for match in MENTIONS.finditer(text):
            mention = match[0].strip("`") if match[2] is None else match[2]
            if match[1] is None or EXPRESSION.fullmatch(mention):
                stale += [f"{place}: {word}" for word in words(mention.split("(")[0]) - names - FOREIGN]
    assert stale == []


def test_pages_name_what_is_there() -> None:
    """A name or a path in the prose of a page is one in the code, or in the code of a page."""
    names = set(read_source()[0])
    for folder in ("docs", "benchmarks", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= words(path.read_text("utf-8")) if path != Path(__file__) else set()
    prose = {}
    for path, text in pages():
        prose[path] = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for block in re.findall(r"```.*?```", text, re.DOTALL):
            names |= words(block)
    stale = []
    for path, text in prose.items():
        for mention in re.findall(r"`([^`\n]+)`", text):
            if EXPRESSION.fullmatch(mention):
                stale += [f"{path}: {word}" for word in words(mention.split("(")[0]) - names - FOREIGN]
        for target in re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|lua|md))?)`", text):
            if not any(
                (home / target).exists()
                for home in (ROOT, ROOT / "src" / "stroma", ROOT / "tests", path.parent)
            ):
                stale.append(f"{path}: {target}")
    assert stale == []


def test_no_foreign_name_is_listed_in_vain() -> None:
    """Each name of another library that the checks allow is on a page or in a docstring."""
    everything = "\n".join([text for _, text in pages()] + [text for _, text in read_source()[1]])
    assert words(everything) >= FOREIGN


PROGRAMS = ROOT / "examples" / "comparison"
SYSTEMS = ("stroma", "pydantic_ai", "langgraph", "dbos", "temporal")


def count_lines(path: Path) -> int:
    """Return the lines of a program without its docstring, blank lines and comments."""
    text = path.read_text("utf-8")
    docstring = ast.parse(text).body[0]
    lines = [line.strip() for line in text.splitlines()[docstring.end_lineno :]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_the_table_of_lines_has_what_the_programs_have() -> None:
    """Each row has the count of each program, and no program is left out."""
    page = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| .*\(\.\./examples/comparison/(\w+)_stroma\.py\).* \|$", page, re.MULTILINE)
    shown = {
        task: [int(cell) for cell in re.findall(r"\[(\d+)\]\(\.\./examples/comparison/" + task, page)]
        for task in rows
    }
    assert shown == {
        task: [count_lines(PROGRAMS / f"{task}_{system}.py") for system in SYSTEMS] for task in rows
    }
    there = {path.stem for path in PROGRAMS.glob("*_*.py")}
    assert there == {f"{task}_{system}" for task in rows for system in SYSTEMS}
