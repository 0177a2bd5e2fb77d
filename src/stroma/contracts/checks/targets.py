"""Targets composed of other types: unions, validators, JSON, and types of a few values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from pydantic_core import SchemaValidator

from stroma.contracts.checks.containers import Inside
from stroma.contracts.checks.pairs import (
    EMPTY,
    FITS,
    LISTS,
    UNKNOWN,
    Fit,
    Reason,
    Side,
    all_of,
    at_most_maybe,
    one_of,
    undecided,
    verdict_on,
)
from stroma.contracts.checks.records import first_word, is_record, name_of
from stroma.contracts.checks.scalars import (
    LEAVES,
    Kind,
    Mismatch,
    Verdict,
    choices_of,
    converts_itself,
    in_words,
)
from stroma.contracts.checks.sources import chosen, is_harmless, tags_of
from stroma.contracts.core_schema import calls_user_code, decodes_text, nodes_of

__all__ = ["Taking"]


class Taking(Inside):
    """The part of :class:`stroma.contracts.checks.compatibility.Fitter` that looks into what wraps other types.

    ``_decoded``: text that the source has decoded is not decoded again.
    """

    _decoded: bool

    def _choices(self, source: Side, values: list[Any], target: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict on a source of a few values, each of which is tried."""
        try:
            schema: Any = {"type": "definitions", "schema": target.node, "definitions": []}
            schema["definitions"] = [n for n in target.defs.values() if n is not target.node]
            refers = any(n["type"] == "definition-ref" for n in nodes_of(target.node))
            if any(
                (calls_user_code(n) and not is_harmless(n)) or converts_itself(n)
                for n in nodes_of(target.node)
            ):
                return undecided(path, source, target, "a validator decides")
            validator = SchemaValidator(
                cast("Any", schema if refers else target.node), cast("Any", target.config)
            )
        except Exception:  # Half of a schema is not always one.
            return undecided(path, source, target, "it is not known before the run")
        refused = []
        for value in values:
            try:
                validator.validate_python(value)
            except Exception:
                refused.append(value)
        if not refused:
            return FITS
        if len(refused) == len(values):
            mismatch = Mismatch(Verdict.NEVER, "type", "none of its values is taken")
            if source.kind == "none":
                mismatch = Mismatch(Verdict.NEVER, "type", "None is not taken")
        else:
            shown = ", ".join(map(in_words, refused[:3])) + (", ..." if len(refused) > 3 else "")
            mismatch = Mismatch(Verdict.MAYBE, "choices", f"of its values {shown} is not taken")
        return verdict_on(mismatch, source, target, path)

    # ------------------------------------------------------------------ what the target takes

    def _unwrap_target(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit | None:
        """Return the verdict for a target composed of other types; None for any other."""
        node, kind = target.node, target.kind
        if kind == "default":
            if node.get("on_error", "raise") == "default":
                return FITS
            return self.match(source, target.to(node["schema"]), path)
        if kind == "nullable":
            values = choices_of(source.node)
            if values is not None and None in values:
                rest = [value for value in values if value is not None]
                if not rest:
                    return FITS
                others = source.to({"type": "literal", "expected": rest})
                return at_most_maybe(self.match(others, target.to(node["schema"]), path))
            return self.match(source, target.to(node["schema"]), path)
        if kind == "union":
            return self._any_of(
                source,
                target,
                [target.to(c[0] if isinstance(c, tuple) else c) for c in node["choices"]],
                path,
            )
        if kind == "tagged-union":
            return self._tagged(source, target, path)
        if kind == "lax-or-strict":
            strict = self._is_strict(target)
            return self.match(source, target.to(node["strict_schema" if strict else "lax_schema"]), path)
        if kind == "chain":
            steps = [self.match(source, target.to(step), path) for step in node["steps"]]
            if steps[0].verdict is Verdict.NEVER:
                return steps[0]
            if all(step["type"] == "is-instance" for step in node["steps"][:-1]):
                return all_of(steps)
            return undecided(path, source, target, "it is validated in several steps")
        if kind == "json":
            return self._json(source, target, path)
        if kind == "model" and node.get("root_model") and not self._is_one(source, node["cls"]):
            inner = replace(target.to(node["schema"]), config=node.get("config") or EMPTY)
            if node.get("custom_init"):
                return undecided(path, source, target, f"{target}.__init__ decides")
            return self.match(source, inner, path)
        if kind.startswith("function-"):
            return self._past_function(target, path, source, lambda inner: self.match(source, inner, path))
        if converts_itself(node) and not self._is_strict(target):
            return undecided(path, source, target, f"{target}._missing_ decides")
        if kind in ("model", "dataclass") and not self._is_one(source, node["cls"]):
            first = first_word(target)
            return undecided(path, source, target, f"the validator {first} decides") if first else None
        return None

    def _json(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        """Return the verdict for a target that decodes JSON text."""
        if self._decoded:
            return self.match(source, target.to(target.node.get("schema", UNKNOWN)), path)
        values = choices_of(source.node)
        if values is not None:
            return self._choices(source, values, target, path)
        if source.kind in ("any", "str", "bytes"):
            mismatch = Mismatch(Verdict.MAYBE, "conversion", "only text that is JSON is taken")
        elif source.kind in LEAVES | LISTS | {"dict", "model", "dataclass", "typed-dict"}:
            mismatch = Mismatch(Verdict.NEVER, "type", "only JSON text is taken")
        else:
            return undecided(path, source, target, "it is not known before the run")
        return verdict_on(mismatch, source, target, path)

    def _past_function(self, target: Side, path: tuple[str, ...], source: Side | str, go_on: Any) -> Fit:
        node = target.node
        inner: Fit = go_on(target.to(node["schema"])) if "schema" in node else Fit(Verdict.MAYBE)
        if decodes_text(node):
            if self._decoded or inner.verdict is Verdict.NEVER:
                return inner
            what = "only text that is encoded so is taken"
            return Fit(
                Verdict.MAYBE, (Reason(Verdict.MAYBE, "conversion", path, str(source), str(target), what),)
            )
        if node["type"] == "function-after":
            if inner.verdict is Verdict.NEVER:
                return inner
            if isinstance(node["function"].get("function"), type) or is_harmless(node):
                return inner
            name = name_of(node)
            if not calls_user_code(node):
                what = f"not every {source} is a {target}"
                own = verdict_on(Mismatch(Verdict.MAYBE, "conversion", what), source, target, path)
            else:
                own = undecided(path, source, target, f"the validator {name} decides")
            return all_of([inner, own])
        if node["type"] == "function-wrap" and not calls_user_code(node) and "schema" in node:
            inside = target.to(node["schema"]).resolved()
            if inside.kind in LISTS and self._is_strict(inside):  # A Sequence: strict in its items alone.
                return cast("Fit", go_on(inside.to({**inside.node, "strict": False})))
            if inside.kind in ("url", "multi-host-url", *LISTS):
                return inner
        return undecided(path, source, target, f"the validator {name_of(node)} decides")

    def _any_of(self, source: Side, target: Side, choices: list[Side], path: tuple[str, ...]) -> Fit:
        fits = [self.match(source, choice, path) for choice in choices]
        best = min((fit.verdict for fit in fits), default=Verdict.NEVER)
        if best is Verdict.ALWAYS:
            return FITS
        if best is Verdict.NEVER:
            return verdict_on(
                Mismatch(Verdict.NEVER, "type", "none of the types takes it"), source, target, path
            )
        likely = [fit for fit in fits if fit.verdict is Verdict.MAYBE]
        if len(likely) == 1:
            return likely[0]
        kinds = {reason.kind for fit in likely for reason in fit.reasons}
        kind: Kind = "undecidable" if "undecidable" in kinds else "union"
        what = "some of its values may be taken by none of the types"
        return Fit(Verdict.MAYBE, (Reason(Verdict.MAYBE, kind, path, str(source), str(target), what),))

    def _tagged(self, source: Side, target: Side, path: tuple[str, ...]) -> Fit:
        choices = {tag: target.to(choice) for tag, choice in target.node["choices"].items()}
        tags = tags_of(source, target.node["discriminator"]) if is_record(source) else None
        if tags is None:
            fit = self._any_of(source, target, list(choices.values()), path)
            if fit.verdict is Verdict.NEVER:
                return fit
            return undecided(path, source, target, "its tag is not known before it runs")
        # As pydantic itself finds one: a member of an enum may be its value, or may not.
        found_tags = {tag: chosen(list(choices), tag) for tag in tags}
        fits = [self.match(source, choices[fit], path) for fit in found_tags.values() if fit is not None]
        strange = [tag for tag, fit in found_tags.items() if fit is None]
        if not strange:
            return all_of(fits) if len(fits) <= 1 or all(f == fits[0] for f in fits) else one_of(fits)
        shown = ", ".join(map(in_words, strange[:3]))
        verdict = Verdict.MAYBE if fits else Verdict.NEVER
        return verdict_on(
            Mismatch(verdict, "choices", f"its tag may be {shown}, which none of the types has"),
            source,
            target,
            path,
        )
