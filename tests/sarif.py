"""What SARIF 2.1.0 demands of the parts that we write (OASIS, sections 3.13 to 3.30 and 3.49 to 3.58)."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

__all__ = ["problems_of"]

LEVELS = ("none", "note", "warning", "error")


def problems_of(log: Any) -> list[str]:
    """Every place of a log that is not as it must be."""
    found: list[str] = []

    def must(condition: Any, what: str) -> None:
        if not condition:
            found.append(what)

    def keys(value: dict[str, Any], known: str, needed: str, where: str) -> None:
        must(set(value) <= set(known.split()), f"{where}: unknown {set(value) - set(known.split())}")
        must(set(needed.split()) <= set(value), f"{where}: lacks {set(needed.split()) - set(value)}")

    keys(log, "$schema version runs", "version runs", "log")
    must(log["version"] == "2.1.0", "version")
    for run in log["runs"]:
        keys(run, "tool columnKind results", "tool", "run")
        must(run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints"), "columnKind")
        driver = run["tool"]["driver"]
        keys(driver, "name semanticVersion rules", "name", "driver")
        must(re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", driver["semanticVersion"]), "semanticVersion")
        rules = driver["rules"]
        must(len({rule["id"] for rule in rules}) == len(rules), "rules are unique")
        for rule in rules:
            keys(rule, "id name shortDescription", "id", "rule")
            must(rule["shortDescription"]["text"], "shortDescription")
        for result in run["results"]:
            keys(
                result,
                "ruleId ruleIndex level message properties locations relatedLocations",
                "message",
                "result",
            )
            must(rules[result["ruleIndex"]]["id"] == result["ruleId"], "ruleIndex")
            must(result["level"] in LEVELS, "level")
            must(isinstance(result["message"]["text"], str), "message")
            for place in [*result.get("locations", []), *result.get("relatedLocations", [])]:
                physical = place["physicalLocation"]
                keys(physical, "artifactLocation region", "artifactLocation", "physicalLocation")
                uri = physical["artifactLocation"]["uri"]
                must(re.fullmatch(r"[\x21-\x7e]+", uri) and "\\" not in uri, f"uri {uri!r}")
                must(urlsplit(uri).scheme in ("", "file"), f"uri {uri!r}")
                must(physical["region"]["startLine"] >= 1, "startLine")
    return found
