"""The clients of AG-UI and of the Vercel AI SDK, from npm, read what stroma.wire writes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.npm import missing, npm_packages
from tests.wire.scenes import SCENES, Scene, mapped, random_scene, shown_by

from stroma.wire import sse

_HERE = Path(__file__).parent


async def read(protocol: str, scenes: list[Scene]) -> list[Any]:
    """Return what a client makes of scenes."""
    home = npm_packages(_HERE / "tools")
    if home is None:
        missing("npm cannot install the clients of AG-UI and the Vercel AI SDK here")
    node = shutil.which("node")
    assert node is not None
    streams = [
        {
            "protocol": protocol,
            "request": scene.request,
            "body": "".join([part async for part in sse(mapped(protocol, scene))]),
        }
        for scene in scenes
    ]
    code = (_HERE / "clients.mjs").read_text("utf-8")
    command = [node, "--input-type=module", "--eval", code]
    given = json.dumps(streams)
    done = subprocess.run(command, cwd=home, input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    return results


async def test_a_client_of_ag_ui_has_the_texts_of_successful_attempts_only() -> None:
    """Its own checks accept every event in its place; it ends with the right texts and the right outcome."""
    for (name, scene), seen in zip(SCENES.items(), await read("ag_ui", list(SCENES.values())), strict=True):
        assert "problem" not in seen, (name, seen)
        texts = [message["content"] for message in seen["messages"] if message["role"] == "assistant"]
        assert (texts, seen["messages"][0]["content"]) == (scene.texts, "Hello?"), name
        outcome = seen["outcome"]
        known = (
            outcome.get("message") or [one["id"] for one in outcome.get("interrupts", ())] or outcome["type"]
        )
        assert known in (scene.end, [scene.end]), name


async def test_a_client_of_the_vercel_ai_sdk_has_the_texts_of_successful_attempts_only() -> None:
    """Its schema accepts every chunk, and its reader every order; the message shows the right texts."""
    for (name, scene), seen in zip(SCENES.items(), await read("vercel", list(SCENES.values())), strict=True):
        assert "problem" not in seen, (name, seen)
        assert shown_by(seen["message"]) == scene.texts, name
        assert seen["message"]["id"] == "r1"
        assert seen["errors"] == (
            [scene.end] if scene.end in ("lost", "the run ended as INTERRUPTED") else []
        ), name


@pytest.mark.parametrize("protocol", ["ag_ui", "vercel"])
async def test_a_client_reads_every_history_of_a_run(protocol: str) -> None:
    """However attempts fail, die and are restored, no event is refused, and texts equal outputs."""
    scenes = [random_scene(seed) for seed in range(300)]
    for seed, (scene, seen) in enumerate(zip(scenes, await read(protocol, scenes), strict=True)):
        assert "problem" not in seen, (seed, seen)
        if protocol == "ag_ui":
            texts = [message["content"] for message in seen["messages"] if message["role"] == "assistant"]
        else:
            texts = shown_by(seen["message"])
        assert sorted(texts) == scene.texts, seed
