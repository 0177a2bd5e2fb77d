"""Names of the code of pipelines: a run that is blocked for some code may fit other code."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, Final

from stroma.checkpoint.queue import ServedCode
from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.contracts.schema import schema_of
from stroma.runner.pipeline import Pipeline, nodes_of

__all__ = ["code_of"]

_NAME_DIGITS: Final = 12


def code_of(pipeline: Pipeline) -> ServedCode:
    """Return the versions that a pipeline serves, and a name that is the same in each process with the same code.

    The name is made of the version, the ids and schemas of the nodes, and the bodies of flows with the nodes
    that they name. Code of one name tries a blocked run again after a while, code of another name at once.
    """
    digest = hashlib.sha256()
    for part in _parts_of(nodes_of(pipeline), set()):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    name = digest.hexdigest()[:_NAME_DIGITS]
    version = pipeline.version
    return ServedCode(pipeline.versions, name if version is None else f"{version}+{name}")


def _parts_of(nodes: Iterable[Node | Group], seen: set[str]) -> Iterator[str]:
    """Yield what the code of nodes consists of. ``seen``: ids of flows, which may call each other."""
    for node in nodes:
        yield node.node_id
        if isinstance(node, Group):
            yield from _parts_of(node.children, seen)
            continue
        if node.contract is not None:
            yield schema_of(node.contract.input_schema).fingerprint
            yield schema_of(node.contract.output_schema).fingerprint
        if isinstance(node, FlowNode) and node.node_id not in seen:
            seen.add(node.node_id)
            flow: Any = node.func
            code = getattr(flow.body, "__code__", None)
            if isinstance(code, CodeType):
                yield from _parts_of_code(code)
                yield from _parts_of(_named_nodes(flow.body), seen)


def _named_nodes(function: FunctionType) -> Iterator[Node | Group]:
    """Yield the nodes that a function finds by name: in its module, or in the function around it."""
    cells = function.__closure__ or ()
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    for cell in cells:
        with contextlib.suppress(ValueError):  # It is empty.
            values.append(cell.cell_contents)
    for value in values:
        is_marked = isinstance(value, (FunctionType, Pipeline)) and hasattr(value, "_stroma_node_id")
        if is_marked or isinstance(value, Group):
            yield find_node(value)


def _parts_of_code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:  # The order of a set differs between processes.
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
