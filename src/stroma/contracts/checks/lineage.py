"""The lineage of a pipeline: which field of which node feeds which, as plain data, Mermaid or SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel

from stroma._utils import svg as render
from stroma._utils.svg import Box, Line, Link, Tone
from stroma._utils.text import as_mermaid
from stroma.contracts.checks.check import check_nodes
from stroma.contracts.checks.flow import Crossing, flow_of
from stroma.contracts.checks.records import Record, Wanted, look_up, record_of, record_of_class, wanted_of
from stroma.contracts.checks.types import Finding, Side
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of


@dataclass(frozen=True, slots=True)
class Lineage:
    """The nodes of a pipeline as boxes, their fields as lines, and what feeds what as links."""

    name: str
    boxes: tuple[Box, ...]
    links: tuple[Link, ...]

    @property
    def top_level(self) -> list[str]:
        """The ids of the nodes in order of position, without those inside groups."""
        return [box.title for box in self.boxes if not box.parent and box.kind != "input"]

    def data(self) -> dict[str, Any]:
        """Return plain data, for JSON. ``at``: the position, and the place in groups ("2.0"), or "input"."""
        return {
            "pipeline": self.name,
            "nodes": [
                {
                    "at": box.id,
                    "node_id": box.title,
                    "kind": box.kind,
                    "group": box.parent or None,
                    "input": box.left_title or None,
                    "output": box.right_title or None,
                    "takes": [_line_data(line) for line in box.left],
                    "gives": [_line_data(line) for line in box.right],
                }
                for box in self.boxes
            ],
            "edges": [
                {
                    "from": link.source,
                    "field": link.source_line or None,
                    "to": link.target,
                    "feeds": link.target_line or None,
                    "verdict": link.tone or "fits",
                }
                for link in self.links
            ],
        }

    def svg(self) -> str:
        """Return the lineage as a self-contained SVG image."""
        return render.svg(self.boxes, self.links, title=self.name)

    def drawing(self, rate: Callable[[Box], Box], href: Callable[[Box], str]) -> str:
        """Return the lineage for a page. ``rate`` adds figures to a box; ``href``: its address."""
        return render.svg([rate(box) for box in self.boxes], self.links, title=self.name, href=href)

    def mermaid(self) -> str:
        """Return the lineage as a Mermaid flow chart."""
        lines = ["flowchart LR"]
        inside: dict[str, list[Box]] = {}
        for box in self.boxes:
            inside.setdefault(box.parent, []).append(box)

        def write(parent: str, indent: str) -> None:
            for box in inside.get(parent, ()):
                name = _mermaid_id(box.id)
                if box.id in inside:
                    lines.append(f'{indent}subgraph {name}["{as_mermaid(box.title)}"]')
                    write(box.id, indent + "    ")
                    lines.append(f"{indent}end")
                else:
                    types = " → ".join(filter(None, (box.left_title, box.right_title)))
                    label = as_mermaid(box.title) + (f"<br/>{as_mermaid(types)}" if types else "")
                    lines.append(f'{indent}{name}["{label}"]')

        write("", "    ")
        between: dict[tuple[str, str], list[Link]] = {}
        for link in self.links:
            between.setdefault((link.source, link.target), []).append(link)
        broken: list[str] = []
        for number, ((source, target), links) in enumerate(between.items()):
            label = ", ".join(dict.fromkeys(filter(None, map(_feeds, links))))
            unknown = all(link.tone == "unknown" for link in links)
            arrow = "-.->" if unknown else "-->"
            text = f'|"{as_mermaid(label)}"|' if label else ""
            lines.append(f"    {_mermaid_id(source)} {arrow}{text} {_mermaid_id(target)}")
            tones = {link.tone for link in links}
            if "error" in tones or "warning" in tones:
                colour = "#dc2626" if "error" in tones else "#d97706"
                broken.append(f"    linkStyle {number} stroke:{colour},stroke-width:2px")
        return "\n".join([*lines, *broken]) + "\n"


def _line_data(line: Line) -> dict[str, Any]:
    data = asdict(line)
    return {"name": data["name"], "type": data["note"], "verdict": data["tone"] or "fits"}


def _feeds(link: Link) -> str:
    if link.source_line == link.target_line:
        return link.source_line
    return f"{link.source_line} → {link.target_line}" if link.source_line else link.target_line


def _mermaid_id(at: str) -> str:
    return "n" + at.replace(".", "_")


# ---------------------------------------------------------------------- making it


def lineage_of(name: str, nodes: Sequence[Node | Group], registry: ContractRegistry) -> Lineage:
    """Return the lineage of a pipeline by its contracts alone. A node without one is a box without lines."""
    findings = check_nodes(nodes, registry)
    tones = _tones(findings)
    maker = _Maker(tones)
    for one in flow_of(nodes, registry):
        if isinstance(one, Crossing):
            maker.add(one)
    inputs = tuple(maker.input_lines.values())
    boxes = [Box("input", "input", "input", right=inputs, right_title=maker.input_title), *maker.boxes]
    return Lineage(name, tuple(boxes), tuple(dict.fromkeys(maker.links)))


def _tones(findings: Sequence[Finding]) -> dict[tuple[str, str], Tone]:
    """Return the verdicts on the fields that nodes take, by place and field name."""
    tones: dict[tuple[str, str], Tone] = {}
    for finding in findings:
        if finding.kind == "collision":
            continue
        for path in finding.path.split(", "):
            key = finding.target_at, path
            if tones.get(key) != "error":
                tones[key] = finding.severity
    return tones


class _Maker:
    def __init__(self, tones: Mapping[tuple[str, str], Tone]) -> None:
        self.boxes: list[Box] = []
        self.links: list[Link] = []
        self.input_lines: dict[str, Line] = {}
        self.input_title = ""
        self._tones = tones

    def add(self, crossing: Crossing) -> None:
        node, at = crossing.node, crossing.to.at
        parent = at.rpartition(".")[0]
        if isinstance(node, Group):
            kind = "map_over" if node.is_map else "sequence" if node.is_sequence else "parallel"
            title = f"{node.node_id} into {node.output_field}" if node.output_field else node.node_id
            self.boxes.append(Box(at, title, kind, parent))
            if node.is_map and not node.has_external_items:
                self._over(crossing, node)
            return
        if crossing.contract is None:
            self.boxes.append(Box(at, node.node_id, "no contract", parent))
            self.links.append(Link(crossing.state.giver.at, "", at, "", "unknown"))
            return
        taken, returned = crossing.contract.input_schema, crossing.output  # None: it cannot be read.
        left = self._takes(crossing, taken)
        right = (
            ()
            if returned is None
            else tuple(Line(name, str(side)) for name, side in _fields(returned).items())
        )
        promised = "" if returned is None else returned.__name__
        self.boxes.append(Box(at, node.node_id, "node", parent, left, right, taken.__name__, promised))

    def _over(self, crossing: Crossing, group: Group) -> None:
        if crossing.state.giver.at == "input" and crossing.state.model is None:
            self.input_lines.setdefault(group.items_field, Line(group.items_field, "list"))

    def _tone(self, at: str, name: str, list_at: str = "") -> Tone:
        start = f"{list_at}[].{name}" if list_at else name
        tones = [
            tone
            for (target, path), tone in self._tones.items()
            if target == at and (path == start or path.startswith((f"{start}.", f"{start}[")))
        ]
        return "error" if "error" in tones else "warning" if tones else ""

    def _takes(self, crossing: Crossing, taken: type[BaseModel]) -> tuple[Line, ...]:
        state, at = crossing.state, crossing.to.at
        wanted = _wanted(taken)
        if wanted is None:
            name = "root"
            source = state.list_at or (
                "root" if state.model is not None and schema_of(state.model).is_root else ""
            )
            self.links.append(Link(state.giver.at, source, at, name, self._tone(at, "")))
            if state.giver.at == "input" and state.model is None and not state.list_at:
                self.input_lines.setdefault(name, Line(name, taken.__name__))
                self.links[-1] = Link("input", name, at, name)
            return (Line(name, str(_fields(taken)["root"])),)
        record = self._record(crossing)
        lines = []
        for field in wanted.fields:
            tone = self._tone(at, field.name, state.list_at)
            if record is None and state.giver.at == "input" and not state.list_at:
                self.input_lines.setdefault(field.name, Line(field.name, str(field.side)))
                self.input_title = self.input_title or taken.__name__
                self.links.append(Link("input", field.name, at, field.name))
            elif record is None:
                pass
            else:
                source_field = look_up(field, record, by_name=schema_of(taken).traits.has_validation_aliases)
                if source_field is not None:
                    by = state.origins.get(source_field[0], state.giver)
                    source = state.list_at or source_field[0]
                    self.links.append(Link(by.at, source, at, field.name, tone))
                    lines.append(Line(field.name, str(field.side), tone))
                    continue
            lines.append(Line(field.name, str(field.side), tone))
        if record is None and (state.giver.at != "input" or state.list_at):
            self.links.append(Link(state.giver.at, state.list_at, at, "", "unknown"))
        return tuple(lines)

    def _record(self, crossing: Crossing) -> Record | None:
        """Return the input of a node by field name; None if it is not known."""
        state = crossing.state
        if state.item is not None:
            item = state.item.resolved()
            if item.is_record:
                return record_of(item)
            contract = crossing.contract
            fields = {} if contract is None else contract.input_schema.model_fields
            required = [name for name, info in fields.items() if info.is_required()]
            if item.kind not in ("any", "dict") and len(required) == 1 and not state.bare:
                return Record(str(item), {required[0]: item})
            return None
        if state.model is None or schema_of(state.model).is_root:
            return None
        record = record_of_class(state.model)
        return replace(record, fields={**record.computed, **record.fields})


def _wanted(model: type[BaseModel]) -> Wanted | None:
    """Return the fields that a class takes; None for a root model."""
    if schema_of(model).is_root:
        return None
    return wanted_of(Side.of_model(model))


def _fields(model: type[BaseModel]) -> dict[str, Side]:
    if not schema_of(model).is_root:
        return dict(record_of_class(model).fields)
    return {"root": Side.of_root(model)}
