"""What SARIF 2.1.0 demands: its JSON schema, and the sentences of the standard that no schema can say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator

__all__ = ["problems_of"]

SCHEMA = json.loads(Path(__file__).with_name("sarif-2.1.0.json").read_text("utf-8"))


def problems_of(log: Any) -> list[str]:
    """Every place of a log that is not as it must be."""
    findings = [f"{e.json_path}: {e.message}" for e in Draft202012Validator(SCHEMA).iter_errors(log)]
    for run in log["runs"] if not findings else ():
        driver = run["tool"]["driver"]
        if not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", driver["semanticVersion"]):
            findings.append(f"{driver['semanticVersion']} is no semantic version")
        rules = [rule["id"] for rule in driver["rules"]]
        if len(set(rules)) < len(rules):
            findings.append(f"a rule is told twice: {rules}")
        for result in run["results"]:
            if rules[result["ruleIndex"]] != result["ruleId"]:
                findings.append(f"ruleIndex {result['ruleIndex']} is not {result['ruleId']}")
            for place in [*result.get("locations", []), *result.get("relatedLocations", [])]:
                uri = place["physicalLocation"]["artifactLocation"]["uri"]
                # The format "uri-reference" is no part of what a validator must check.
                if (
                    not re.fullmatch(r"[\x21-\x7e]+", uri)
                    or "\\" in uri
                    or urlsplit(uri).scheme not in ("", "file")
                ):
                    findings.append(f"uri {uri!r}")
    return findings
