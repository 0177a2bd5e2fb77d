"""Containers in the examples and the documentation: without root, without privileges, of a fixed version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
#: Code blocks of Markdown, by language.
BLOCK = re.compile(r"^```(yaml|yml|dockerfile)\n(.*?)^```", re.MULTILINE | re.DOTALL | re.IGNORECASE)
#: Of these images the root file system must be writable.
WRITABLE = ("grafana/grafana", "arizephoenix/phoenix")


def texts() -> Iterator[tuple[str, str, str]]:
    """Name, language and text of each file or block of YAML, and each Dockerfile."""
    for folder in (ROOT / "examples", ROOT / "docs"):
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(ROOT))
            if path.suffix in (".yaml", ".yml"):
                yield name, "yaml", path.read_text("utf-8")
            elif "Dockerfile" in path.name:
                yield name, "dockerfile", path.read_text("utf-8")
            elif path.suffix == ".md":
                for language, text in BLOCK.findall(path.read_text("utf-8")):
                    yield name, "dockerfile" if language.lower() == "dockerfile" else "yaml", text


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, language, text in texts():
        if language == "yaml":
            yield from ((name, one) for one in yaml.safe_load_all(text) if isinstance(one, dict))


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in documents():
        for service, value in document.get("services", {}).items():
            yield f"{name}: {service}", value


def dockerfiles() -> Iterator[tuple[str, str]]:
    yield from ((name, text) for name, language, text in texts() if language == "dockerfile")
    for name, service in services():
        inline = isinstance(service.get("build"), dict) and service["build"].get("dockerfile_inline")
        if inline:
            yield name, inline


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, labels and spec of each pod."""
    for name, document in documents():
        found = document
        if document.get("kind") == "CronJob":
            found = document["spec"]["jobTemplate"]
        template = found if document.get("kind") == "Pod" else (found.get("spec") or {}).get("template")
        if "kind" in document and template:
            yield (
                f"{name}: {document['metadata']['name']}",
                template["metadata"].get("labels", {}),
                template["spec"],
            )


def check_image(image: str) -> None:
    _, colon, tag = image.rpartition("/")[2].partition(":")
    assert colon, image
    assert re.search(r"\d", tag), image
    assert "latest" not in tag, image


def test_images_run_as_somebody_else() -> None:
    """Every Dockerfile has a fixed base, installs fixed versions of this package, and ends not as root."""
    seen = list(dockerfiles())
    assert len(seen) >= 3
    for name, text in seen:
        bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        for base in bases:
            check_image(base)
        users = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
        assert users, name
        assert users[-1][0] != "0", name
        for requirement in re.findall(r"stroma-runner\S*", text):
            assert requirement.strip("'\"").partition("==")[2] == re.sub(
                r"\.?(dev|rc|a|b).*", "", version("stroma-runner")
            ), name


def test_services_have_no_privileges() -> None:
    """Every composed service has a version, a user, and no capabilities; most can write only to volumes."""
    seen = list(services())
    assert len(seen) >= 7
    for name, service in seen:
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        image = service.get("image", "")
        if image:
            check_image(image)
        if image or "user" in service:
            assert int(str(service["user"]).partition(":")[0]) > 0, name
        assert service.get("read_only") or image.startswith(WRITABLE), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_pods_have_no_privileges() -> None:
    """Every pod runs without root, capabilities, token and writable root, and a network policy selects it."""
    policies = [one["spec"] for _, one in documents() if one.get("kind") == "NetworkPolicy"]
    seen = list(pods())
    assert len(seen) >= 2
    for name, labels, spec in seen:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert context["runAsUser"] > 0, name
        assert spec["automountServiceAccountToken"] is False, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            check_image(container["image"])
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
        (policy,) = [one for one in policies if one["podSelector"]["matchLabels"].items() <= labels.items()]
        assert {"Ingress", "Egress"} <= set(policy["policyTypes"]), name


@pytest.mark.parametrize("image", ["postgres", "postgres:latest", "registry:5000/app", "app:nonroot"])
def test_an_image_without_a_version_is_found(image: str) -> None:
    """The check of images finds those without a version."""
    with pytest.raises(AssertionError):
        check_image(image)
