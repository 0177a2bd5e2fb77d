"""Whether a recorded run can be resumed, asked without running anything."""

from typing import Any

import pytest
from pydantic import BaseModel, create_model
from tests.kit import Text

from stroma import ContractRegistry, NodeContract, RunConfig, map_over, parallel, stroma_node
from stroma.checkpoint import Committed
from stroma.cli.resume_plan import Incompatibility, changes_since
from stroma.contracts.node import find_node
from stroma.contracts.schema import schema_of

Longer = create_model("Text", text=(str, ...), n=(int, 0))


def node(node_id: str, input_model: type[BaseModel] = Text, **options: Any) -> Any:
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=node_id, input_schema=Text, output_schema=input_model, **options
    )

    async def func(state: Any) -> Any: ...

    return stroma_node(node_id, contract)(func)


def recorded_run(
    node_id: str, group: str = "", model: BaseModel | None = None, output: bytes | None = None
) -> Committed:
    instance = model or Text(text="x")
    schema = schema_of(type(instance))
    contract = f"{schema.fingerprint}:{group}" if group else schema.fingerprint
    return Committed(node_id, output or schema.encode(instance), contract)


def changes(commits: dict[tuple[int, str], Committed], *nodes: Any, **config: Any) -> list[Incompatibility]:
    return changes_since("r", commits, [find_node(n) for n in nodes], ContractRegistry(), RunConfig(**config))


def test_a_run_of_the_same_nodes_can_be_resumed() -> None:
    """Outputs of nodes, of children of groups and of items all have their place."""
    grouped = parallel(node("b"), node("c"))
    mapped = map_over("x", node("d"), into="y")
    commits = {
        (0, ""): recorded_run("a"),
        (1, "0"): recorded_run("b", grouped.node_id),
        (1, "1"): recorded_run("c", grouped.node_id),
        (2, "7"): recorded_run("d", mapped.node_id),
    }
    assert changes(commits, node("a"), grouped, mapped) == []


@pytest.mark.core
def test_every_change_is_told() -> None:
    """Not only the first one: another node, another schema, a missing child, a shorter pipeline."""
    grouped = parallel(node("b"))
    commits = {
        (0, ""): recorded_run("old"),
        (1, "0"): recorded_run("b", "parallel(b, c)"),
        (1, "1"): recorded_run("c", "parallel(b, c)"),
        (2, ""): recorded_run("d"),
        (3, ""): recorded_run("e"),
    }
    result = changes(commits, node("a"), grouped, node("d", Longer))
    places = [(change.at, change.node_id) for change in result]
    assert places == [("0", "old"), ("1.0", "b"), ("1.1", "c"), ("2", "d"), ("3", "e")]
    words = [
        "the pipeline has 'a' there",
        "was made for",
        "no such child",
        "it lacks 'n', which is new",
        "only 3 nodes",
    ]
    assert [word for word, change in zip(words, result, strict=True) if word not in change.message] == []


def test_an_upcast_or_allowed_changes_are_no_obstacle() -> None:
    """Outputs that the contract's upcast reads, or read whatever recorded them, are no change."""
    upcast = node("a", Longer, upcast=lambda raw: {**raw, "n": 1})
    assert changes({(0, ""): recorded_run("a")}, upcast) == []
    assert changes({(0, ""): recorded_run("a")}, node("a", Longer), allow_changes=True) == []


def test_what_cannot_be_read_back_is_told() -> None:
    """An upcast that raises, and an output that today's schema refuses, are told with the mend."""

    def broken(raw: Any) -> Any:
        raise LookupError("no such key")

    (change,) = changes({(0, ""): recorded_run("a")}, node("a", Longer, upcast=broken))
    assert "no such key" in change.message
    assert "resume from there" in change.message
    (change,) = changes({(0, ""): recorded_run("a", output=b'{"text": 5}')}, node("a"))
    assert change.at == "0"
    needs = create_model("Text", text=(str, ...), n=(int, ...))
    (change,) = changes({(0, ""): recorded_run("a")}, node("a", needs), allow_changes=True)
    assert "Field required" in change.message
