"""What goes beside a release: a bill of materials (CycloneDX) and the statement to sign."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

_NAMESPACE: Final = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of addresses, RFC 9562


def bill_of_materials(
    project: Mapping[str, Any], requirements: str, archives: Iterable[Path]
) -> dict[str, Any]:
    """Return a CycloneDX 1.6 bill of the distribution and of what its extras are tested with.

    ``requirements``: pinned, with hashes. The same input gives the same bill.
    """
    name, version = project["name"], project["version"]
    reference = f"pkg:pypi/{name}@{version}"
    blocks = re.findall(
        r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)((?:.*\n    --hash=.*)*)", requirements, re.MULTILINE
    )
    components = [
        {
            "type": "library",
            "name": package,
            "version": release,
            "bom-ref": f"pkg:pypi/{package.lower()}@{release}",
            "purl": f"pkg:pypi/{package.lower()}@{release}",
            "scope": "optional",
            "externalReferences": [
                {
                    "type": "distribution",
                    "url": f"https://pypi.org/project/{package}/{release}/",
                    "hashes": [
                        {"alg": "SHA-256", "content": one} for one in re.findall(r"sha256:(\w+)", hashes)
                    ],
                }
            ],
        }
        for package, release, hashes in blocks
    ]
    core = {re.split(r"[<>=!~ ;\[]", needed)[0].lower() for needed in project["dependencies"]}
    for component in components:
        if component["name"].lower() in core:
            component["scope"] = "required"
    files = [
        {"type": "file", "name": path.name, "hashes": [{"alg": "SHA-256", "content": _sha256(path)}]}
        for path in archives
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, reference + requirements)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "name": name,
                "version": version,
                "bom-ref": reference,
                "purl": reference,
                "licenses": [{"license": {"id": "MIT"}}],
                "components": files,
            }
        },
        "components": components,
        "dependencies": [{"ref": reference, "dependsOn": [one["bom-ref"] for one in components]}],
    }


def wrong_bill(bill: Mapping[str, Any], project: Mapping[str, Any]) -> list[str]:
    """Return what a bill lacks: each dependency that the project names must be in it, with its hashes."""
    named = {one["name"].lower().replace("_", "-") for one in bill["components"]}
    wanted = [
        re.split(r"[<>=!~ ;\[]", needed)[0].lower().replace("_", "-") for needed in project["dependencies"]
    ]
    wrong = [f"the bill of materials lacks {name}" for name in wanted if name not in named]
    wrong += [
        f"{one['name']} has no hash in the bill of materials"
        for one in bill["components"]
        if not one["externalReferences"][0]["hashes"]
    ]
    return wrong


def statement(archives: Iterable[Path]) -> dict[str, Any]:
    """Return the in-toto statement that a publish attestation (PEP 740) signs for each of these files."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path.name, "digest": {"sha256": _sha256(path)}} for path in archives],
        "predicateType": "https://docs.pypi.org/attestations/publish/v1",
        "predicate": None,
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
