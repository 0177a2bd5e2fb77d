"""The sdist and the wheel: how they are built, and what must be in them and what not."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST_FILE = 600_000  # bytes
LARGEST = {".whl": 1_500_000, ".gz": 4_000_000}  # bytes, compressed
WHEEL = (
    "stroma/py.typed",
    "stroma/ui/static/ui.css",
    "stroma/ui/static/ui.js",
    "stroma/ui/static/icon.svg",
    "stroma/ui/templates/run.html",
)
SDIST = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "src/stroma/py.typed",
    "tests/project/test_published_surface.py",
)


def tracked(root: Path) -> list[str]:
    """The files that git knows, by their paths below root."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, stdout=subprocess.PIPE, check=True)
    names = [name for name in done.stdout.decode().split("\0") if name]
    return [name for name in names if (root / name).is_file()]


def copy_of(root: Path, names: Iterable[str], target: Path) -> Path:
    """A tree with nothing in it but what git knows, as after a clone."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    return target


def build(tree: Path, target: Path, *kinds: str) -> list[Path]:
    """Build the kinds ("sdist", "wheel") in a tree."""
    options = [option for kind in kinds for option in ("-t", kind)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target), *options]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return sorted(target.iterdir())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(path: Path) -> dict[str, bytes]:
    """What is in an archive, by name; of an sdist without the folder that is around it all."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    findings = {}
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            file = sdist.extractfile(member)
            if file is not None:
                findings[member.name.partition("/")[2]] = file.read()
    return findings


def wrong_contents(path: Path) -> list[str]:
    """What is missing in an archive, and what should not be there."""
    result = contents(path)
    is_wheel = path.suffix == ".whl"
    wrong = [f"{path.name} has no {name}" for name in (WHEEL if is_wheel else SDIST) if name not in result]
    if is_wheel and not any(name.endswith("/licenses/LICENSE") for name in result):
        wrong.append(f"{path.name} has no licence")
    for name, data in result.items():
        if len(data) > LARGEST_FILE:
            wrong.append(
                f"{path.name} has {name} of {len(data)} bytes; leave it out, or make it when it is needed"
            )
        if is_wheel and not re.match(r"stroma(/|_runner-[^/]+\.dist-info/)", name):
            wrong.append(f"{path.name} has {name}, which would be installed beside stroma")
        if (
            re.search(r"(^|/)(__pycache__|\.git|\.venv)(/|$)|\.(db|pyc|lock)$", name)
            and name != "requirements.lock"
        ):
            wrong.append(f"{path.name} has {name}, which belongs to a machine")
    if path.stat().st_size > LARGEST[path.suffix]:
        wrong.append(f"{path.name} takes {path.stat().st_size} bytes; {LARGEST[path.suffix]} are enough")
    return wrong


def leaks(files: dict[str, bytes], private: Iterable[str]) -> list[str]:
    """Files with an address or a path that is of this machine alone."""
    return [
        f"{name} has {text!r} in it"
        for text in private
        for name, data in files.items()
        if text.encode() in data
    ]


def disagreement(version: str, changelog: str, tags: Iterable[str]) -> list[str]:
    """What is not said alike of a version; a development version is under Unreleased, and has no tag."""
    wrong = []
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?", changelog, re.MULTILINE)
    dates = dict(sections)
    if re.search(r"\.dev\d*$", version):
        if "Unreleased" not in dates:
            wrong.append(f"{version} is being worked on, and CHANGELOG.md has no section [Unreleased]")
        final = version.rpartition(".dev")[0]
        if final in dates:
            wrong.append(f"CHANGELOG.md has {final} released, and pyproject.toml says {version}")
        wrong += [f"the tag {tag} is on a development version" for tag in tags if re.match(r"v\d", tag)]
        return wrong
    if version not in dates:
        wrong.append(f"CHANGELOG.md has no section [{version}]")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", dates[version]):
        wrong.append(f"CHANGELOG.md has no date for [{version}]; write: ## [{version}] - YYYY-MM-DD")
    elif next(name for name, _ in sections if name != "Unreleased") != version:
        wrong.append(f"[{version}] is not the newest section of CHANGELOG.md")
    wrong += [
        f"the tag {tag} is on version {version}"
        for tag in tags
        if re.match(r"v\d", tag) and tag != f"v{version}"
    ]
    return wrong
