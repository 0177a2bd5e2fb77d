"""Every small change of a file of the source: the operators of mutmut, and calls and raises that are left out.

mutmut itself leaves out functions with decorators, because it cannot wrap those. Here a mutant is a whole file, so that only
annotations, decorators themselves and docstrings are left alone. Of the three changes of a text one is made: its letters in
another case are as good as equivalent in SQL, and otherwise die with the first.

mutmut is in an environment of its own (tests/tools), so this module runs as a process: ``python -m tests.mutants.generate ROOT
FILE`` prints the mutants as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation.file_mutation import Mutation, MutationVisitor
from mutmut.mutation.mutators import OPERATORS_TYPE, mutation_operators, operator_string
from mutmut.mutation.pragma_handling import IgnoredCode
from tests.mutants.mutant import Mutant


def _left_out(node: cst.Expr | cst.Raise) -> Iterable[cst.BaseSmallStatement]:
    """`work()`, `await work()` and `raise error` as `pass`."""
    value = (
        node.value.expression if isinstance(node, cst.Expr) and isinstance(node.value, cst.Await) else node
    )
    if isinstance(node, cst.Raise) or isinstance(getattr(value, "value", value), cst.Call):
        yield cst.Pass()


def _text(node: cst.SimpleString) -> Iterable[cst.BaseString]:
    yield from list(operator_string(node))[:1]


OPERATORS: OPERATORS_TYPE = [
    *((kind, operator) for kind, operator in mutation_operators if operator is not operator_string),
    (cst.SimpleString, _text),
    (cst.Expr, _left_out),
    (cst.Raise, _left_out),
]


class _Visitor(MutationVisitor):
    METADATA_DEPENDENCIES = (
        *MutationVisitor.METADATA_DEPENDENCIES,
        WhitespaceInclusivePositionProvider,
    )

    def __init__(self) -> None:
        super().__init__(OPERATORS, IgnoredCode(set(), set(), set()))
        self.within: list[str] = []
        self.spans: list[tuple[int, int]] = []
        # (name and lines of the function around it, where the changed node is), beside `mutations`.
        self.places: list[tuple[str, tuple[int, int], CodeRange | None]] = []

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return False
        # The condition of an `if TYPE_CHECKING:` is never true in a test.
        if (
            isinstance(node, cst.If)
            and isinstance(node.test, cst.Name)
            and node.test.value == "TYPE_CHECKING"
        ):
            return True
        return super()._skip_node_and_children(node)

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            where = self.get_metadata(PositionProvider, node)
            self.within.append(node.name.value)
            self.spans.append((where.start.line, where.end.line))
        before = len(self.mutations)
        further = super().on_visit(node)
        if len(self.mutations) > before:
            where = self.get_metadata(WhitespaceInclusivePositionProvider, node, None)
            line = where.start.line if where else 1
            span = self.spans[-1] if self.spans else (line, line)
            self.places += [(".".join(self.within), span, where)] * (len(self.mutations) - before)
        return further

    def on_leave(self, original_node: cst.CSTNode) -> None:
        super().on_leave(original_node)
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)):
            self.within.pop()
            self.spans.pop()


def _changed(old: Sequence[str], new: Sequence[str]) -> tuple[int, int, int]:
    """(lines that begin alike, the end of what differs in old, the same in new)"""
    begin = 0
    while begin < min(len(old), len(new)) and old[begin] == new[begin]:
        begin += 1
    last, last_new = len(old), len(new)
    while last > begin and last_new > begin and old[last - 1] == new[last_new - 1]:
        last, last_new = last - 1, last_new - 1
    return begin, last, last_new


def _with(module: cst.Module, old: Sequence[str], mutation: Mutation, where: CodeRange | None) -> str:
    """The whole file with one node replaced."""
    if where is not None:
        lines = list(old[where.start.line - 1 : where.end.line])
        before, after = lines[0][: where.start.column], lines[-1][where.end.column :]
        lines[-1] = lines[-1][: where.end.column]
        lines[0] = lines[0][where.start.column :]
        # What depends on the indentation around it is not written here as it stands there.
        if "".join(lines) == module.code_for_node(mutation.original_node):
            text = before + module.code_for_node(mutation.mutated_node) + after
            return "".join([*old[: where.start.line - 1], text, *old[where.end.line :]])
    changed = module.deep_replace(mutation.original_node, mutation.mutated_node)
    assert isinstance(changed, cst.Module)
    return changed.code


def mutants(root: Path, file: str) -> list[Mutant]:
    """The mutants of a file below root, in the order of its lines."""
    text = (root / file).read_text(encoding="utf-8")
    old = text.splitlines(keepends=True)
    visitor = _Visitor()
    module = MetadataWrapper(cst.parse_module(text)).visit(visitor)
    found: dict[str, Mutant] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for mutation, (function, span, where) in zip(visitor.mutations, visitor.places, strict=True):
        new = _with(module, old, mutation, where).splitlines(keepends=True)
        begin, end, end_new = _changed(old, new)
        if end == begin and end_new == begin:
            continue
        # Where nothing is left of the lines, or they only grow, the line before goes with them.
        begin = min(begin, len(old) - 1)
        end, end_new = max(end, begin + 1), max(end_new, begin + 1 + end_new - end)
        before, after = "".join(old[begin:end]), "".join(new[begin:end_new])
        same = seen.setdefault((function, before, after), 0)
        seen[function, before, after] += 1
        digest = hashlib.sha256("\0".join((file, function, before, after, str(same))).encode()).hexdigest()
        key = f"{Path(file).stem}-{digest[:10]}"
        mutant = Mutant(key, file, function, begin + 1, end, *span, before, after)
        try:
            compile(mutant.source(text), file, "exec")
        except SyntaxError:
            continue
        found.setdefault(mutant.source(text), mutant)
    return sorted(found.values(), key=lambda m: (m.first, m.key))


if __name__ == "__main__":
    print(json.dumps([asdict(mutant) for mutant in mutants(Path(sys.argv[1]), sys.argv[2])]))
