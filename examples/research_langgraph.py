"""A durable research graph of LangGraph: two subgraphs in parallel, an approval, one effect, and live text.

    python examples/research_langgraph.py

Needs `pip install "stroma-runner[langgraph]"`, and neither a key nor a network: its model is a fake.
`research_run.py` says how workers and a page run it. Prints:

> lead.reader.search
> lead.reader.search
> lead.reader.read
> lead.reader.read
> Publish '14 pages on the food of otters, 15 pages on the homes of otters'?: yes
> lead.publish_report
> lead.write It| |is| |published| |as| |number| |1|
> It is published as number 1; the web has ['14 pages on the food of otters, 15 pages on the homes of otters']
"""

import operator
from typing import Annotated, Any, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt
from research_run import Question, Report, main, publish, was_published

from stroma import Flow, NotDone, current_node, stroma_flow
from stroma.adapters.langgraph import InterruptAnswer, durable


class Research(TypedDict):
    topic: str
    findings: Annotated[list[str], operator.add]
    receipt: str
    report: str


class Reading(TypedDict):
    aspect: str
    pages: int
    findings: Annotated[list[str], operator.add]


async def search(state: Reading) -> dict[str, Any]:
    return {"pages": len(state["aspect"])}


async def read(state: Reading) -> dict[str, Any]:
    return {"findings": [f"{state['pages']} pages on the {state['aspect']}"]}


reader = StateGraph(Reading)
reader.add_sequence([search, read])
reader.add_edge(START, "search")


def aspects(state: Research) -> list[Send]:
    return [Send("reader", {"aspect": f"{what} of {state['topic']}"}) for what in ("food", "homes")]


def approve(state: Research) -> Command[Any]:
    """Part of the body of the flow: it asks, and has nothing to record."""
    answer = interrupt(f"Publish {', '.join(state['findings'])!r}?")
    return Command(goto="publish_report" if answer == "yes" else END)


async def publish_report(state: Research) -> dict[str, Any]:
    return {"receipt": publish(", ".join(state["findings"]), current_node().idempotency_key)}


def look_up(state: Research, key: str) -> dict[str, Any] | NotDone:
    found = was_published(state, key)
    return {"receipt": found} if isinstance(found, str) else found


async def write(state: Research) -> dict[str, Any]:
    text = f"It is {state['receipt']}"
    model = GenericFakeChatModel(messages=iter([AIMessage(text)]))
    return {"report": str((await model.ainvoke("Write.")).content)}


builder = StateGraph(Research)
for node in (approve, publish_report, write):
    builder.add_node(node.__name__, node)
builder.add_node("reader", reader.compile())
builder.add_conditional_edges(START, aspects, ["reader"])
builder.add_edge("reader", "approve")
builder.add_edge("publish_report", "write")
graph = durable(
    builder.compile(name="lead"),
    {"publish_report": {"effect": True, "reconcile": look_up}, "approve": False},
)


@stroma_flow("research", input=Question, output=Report)
async def research(flow: Flow, question: Question) -> Report:
    state = await graph.ainvoke(Research(topic=question.topic, findings=[], receipt="", report=""))
    return Report(text=state["report"] or "refused")


if __name__ == "__main__":
    main(research, InterruptAnswer("yes"))
