"""`stroma check` and `stroma graph`."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

FLOW = """
    from pydantic import BaseModel, Field
    from stroma import *

    class Text(BaseModel):
        text: str

    class Parts(BaseModel):
        parts: list[str]
        kept: str | None

    class Result(BaseModel):
        parts: list[str]
        kept: str
        total: int = Field(alias="sum")

    def node(node_id, taken, given):
        async def func(state):
            raise RuntimeError("called")
        contract = NodeContract(node_id=node_id, input_schema=taken, output_schema=given)
        return stroma_node(node_id, contract)(func)

    @stroma_node("split", NodeContract(node_id="split", input_schema=Text, output_schema=Parts))
    async def split(state):
        raise RuntimeError("called")

    wrong = Pipeline("wrong", [split, node("result", Result, Text)])
    fine = Pipeline("fine", [split, map_over("parts", node("shout", Text, Text), into="shouted"),
                             node("end", Parts, Parts)])
    odd = Pipeline('<b> "odd" & \\u202e', [node('a"]<script>\\n&', Text, Text),
                                           parallel(split, node("b", Text, Text))])

    async def free(state): ...
    unknown = Pipeline("unknown", [node("a", Text, Text), stroma_node("free", None)(free),
                                   node("c", Text, Text)])
"""


@pytest.fixture
def flows(stroma):
    stroma.file("flows.py", FLOW)
    return stroma


@pytest.mark.core
def test_findings_and_graphs(flows, inside, golden):
    """check has both nodes, the field and the fix of each finding; graph marks them on fields and edges."""
    graphs = [f"graph flows.py:{name} --format json" for name in ("wrong", "unknown")]
    golden(
        "check", "check flows.py:wrong", "check flows.py:fine", "check flows.py:wrong --json", columns=(None,)
    )
    golden("graph", "graph flows.py:fine --format mermaid", *graphs, columns=(None,))
    odd = inside("graph", "flows.py:odd", "--format", "mermaid").out
    assert '    n0["a#34;]#60;script#62; #38;<br/>Text → Text"]' in odd
    assert {path.name for path in flows.home.iterdir()} - {"__pycache__"} == {"sums.py", "flows.py"}


def test_bad_calls_of_check(flows, inside, fails):
    """A missing name or file is one message with the fix."""
    fails(inside("check", "flows.py:nothing"), 4, "nothing", "flows.py:wrong")
    fails(inside("check", "nowhere.py:x"), 4, "nowhere.py")
    fails(inside("graph", "flows.py:split"), 2, "is not a pipeline")
    fails(inside("graph", "flows.py:fine", "--format", "png"), 2, "png")


def test_effects_in_a_flow_are_checked(stroma, inside):
    """check warns of an effect without reconcile that a flow calls, also in a flow that this flow calls."""
    stroma.file(
        "pay.py",
        """
        from pydantic import BaseModel
        from stroma import *

        class Order(BaseModel):
            n: int = 0

        runner = StromaRunner.quick()

        @runner.node("charge", effect=True)
        async def charge(state: Order) -> Order:
            return state

        @runner.flow("inner")
        async def inner(flow: Flow, state: Order) -> Order:
            await flow.step(charge, state)
            return await flow.run(inner, state)

        @runner.flow("outer")
        async def outer(flow: Flow, state: Order) -> Order:
            return await flow.run(inner, state)
        """,
    )
    for name in ("inner", "outer"):
        done = inside("check", f"pay.py:{name}")
        assert done.code == 0
        assert "effect 'charge' has no reconcile" in done.out
        assert f"{name}: flow with 1 node, 0 errors, 1 warning" in done.err


def test_graph_draws_a_file(flows, inside):
    """The graph is an SVG file named after the pipeline, and goes to stdout with --format."""
    done = inside("graph", "flows.py:fine")
    assert (done.code, done.out, done.err) == (0, "", "wrote fine.graph.svg; open it in a browser\n")
    text = Path(flows.home, "fine.graph.svg").read_text()
    assert text == inside("graph", "flows.py:fine", "--format", "svg").out


def test_graph_as_svg(flows, inside):
    """The SVG is XML that stands by itself, in which text of the user's is text and nothing else."""
    for name in ("fine", "wrong", "odd", "unknown"):
        text = inside("graph", f"flows.py:{name}", "--format", "svg").out
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {"svg", "g", "rect", "path", "text", "tspan", "title", "style", "circle"}
        for word in ("http://", "https://", "url(", "@import", "href"):
            assert word not in text.replace("http://www.w3.org/2000/svg", "")
    root = ET.fromstring(inside("graph", "flows.py:odd", "--format", "svg").out)
    texts = ["".join(element.itertext()) for element in root.iter()]
    assert any('a"]<script>' in text for text in texts)
