"""Build the distribution, look into it, install it everywhere it promises to work, and try it.

usage: ./dev release-check [--only EXTRA ...] [--no-installs]

- the version in pyproject.toml, CHANGELOG.md and the tag on this commit say the same;
- sdist and wheel are built twice, in two folders, and are the same byte for byte; the wheel that is built
  from the sdist, too;
- what is in them, and what not; no address and no path of this machine in them or in any tracked file;
- `twine check --strict`;
- no pinned release, and no lowest one, has a known advisory (`./dev audit`);
- a bill of materials (CycloneDX) and the statement that an attestation signs are written to build/release;
- the wheel is installed without extras and with each extra in turn, in a clean environment, from pinned
  requirements with hashes (tests/release/newest.txt; of agent frameworks those of their tests), and
  tests/release/smoke.py runs there;
- `pip install` of the wheel into a new environment by a user, and then the first example of the docs;
- with the lowest releases that pyproject.toml allows (tests/release/lowest.txt), a selection of the tests
  passes.

Exit code 0 if all of it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from tests.docs.blocks import of_page
from tests.release.archives import (
    ROOT,
    build,
    contents,
    copy_of,
    digest,
    disagreement,
    leaks,
    tracked,
    wrong_contents,
)
from tests.release.audit import PINNED, advisories, affected, pins
from tests.release.provenance import bill_of_materials, statement, wrong_bill

HERE = ROOT / "tests" / "release"
PREPARED = ROOT / "build" / "release"
FRAMEWORKS = ROOT / "tests" / "frameworks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Extras that are in `all`: their requirements are pinned together.
TOGETHER = re.findall(r"[\w-]+", PROJECT["optional-dependencies"]["all"][0].partition("[")[2])
# With the lowest releases: resumes, what crosses boundaries, prices, and the store.
LOWEST_TESTS = (
    "tests/engine/test_resume.py",
    "tests/contracts/test_schemas.py",
    "tests/cost/test_prices.py",
    "tests/checkpoint/test_sqlite.py",
)


class Report:
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.begin = time.monotonic()

    def tell(self, what: str, wrong: list[str]) -> None:
        word = "FAIL" if wrong else "ok"
        print(f"{word:4s} {time.monotonic() - self.begin:6.1f} s  {what}", flush=True)
        for line in wrong:
            print(f"     {line}", flush=True)
        if wrong:
            self.failed.append(what)


def private() -> list[str]:
    """What foreign files should not have: this folder, the home folder, and the host of the package index."""
    findings = [str(ROOT)]
    if len(Path.home().parts) > 2:
        findings.append(str(Path.home()))
    for name, value in os.environ.items():
        if re.fullmatch(r"UV_(DEFAULT_INDEX|INDEX_URL|INDEX)|PIP_(INDEX_URL|EXTRA_INDEX_URL)", name):
            host = urlsplit(value).hostname
            if host and host not in ("pypi.org", "localhost"):
                findings.append(host)
    return findings


def names_of(requirements: str) -> dict[str, str]:
    """The pinned requirements by name, each with its hashes."""
    pinned = re.finditer(r"^([\w.-]+)(?:\[[\w,]+\])?==.*(?:\n    --hash=.*)*", requirements, re.MULTILINE)
    return {entry[1]: entry[0] for entry in pinned}


class Environments:
    """Clean environments, one after the other, below a folder."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.wheel = folder, wheel
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("VIRTUAL_ENV", "PYTHON"))
        }

    def uv(self, *arguments: str) -> str:
        done = subprocess.run(["uv", *arguments], env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"uv {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def make(self, name: str, requirements: Path) -> Path:
        """An environment with pinned requirements and the wheel, complete. Gives its Python."""
        home = self.folder / name
        python = home / "bin" / "python"
        self.uv("venv", "--quiet", "--python", sys.executable, str(home))
        install = ("pip", "install", "--quiet", "--python", str(python), "--no-deps")
        self.uv(*install, "--require-hashes", "-r", str(requirements))
        self.uv(*install, str(self.wheel))
        self.uv("pip", "check", "--quiet", "--python", str(python))
        return python

    def chosen(self, extra: str) -> Path:
        """Of the pinned requirements of all extras, those that this one needs."""
        pinned = (HERE / "newest.txt").read_text()
        target = self.folder / f"{extra}.txt"
        options = [] if extra == "bare" else ["--extra", extra]
        self.uv(
            "pip",
            "compile",
            "--quiet",
            "--python",
            sys.executable,
            str(ROOT / "pyproject.toml"),
            *options,
            "-c",
            str(HERE / "newest.txt"),
            "--no-header",
            "--no-annotate",
            "--no-emit-index-url",
            "-o",
            str(target),
        )
        needed = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==", target.read_text(), re.MULTILINE)
        blocks = names_of(pinned)
        target.write_text("\n".join(blocks[name] for name in needed) + "\n")
        return target

    def smoke(self, extra: str) -> list[str]:
        # Deep Agents are made of LangChain, and tested with it.
        framework = (
            FRAMEWORKS / {"deepagents": "langchain"}.get(extra, extra.replace("-", "_")) / "newest.txt"
        )
        is_apart = extra not in TOGETHER and framework.exists()
        try:
            python = self.make(extra, framework if is_apart else self.chosen(extra))
        except (RuntimeError, KeyError) as error:
            return [str(error)]
        command = [str(python), "-I", "-W", "error::SyntaxWarning", str(HERE / "smoke.py"), extra]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False, timeout=300
        )
        return [done.stderr.strip()[-2000:]] if done.returncode else []

    def readme(self) -> tuple[list[str], float]:
        """Return what is wrong with `pip install` of the wheel and the first example, and their seconds."""
        example = next(
            block
            for block in of_page((ROOT / "docs" / "index.md").read_text("utf-8"))
            if block.language == "python"
        )
        folder = self.folder / "readme"
        home = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", str(home)], env=self.env, check=True)
        (folder / "example.py").write_text(example.text, "utf-8")
        python = str(home / "bin" / "python")
        started = time.monotonic()
        for command in (
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{self.wheel}[cli]"],
            [python, "example.py"],
        ):
            done = subprocess.run(
                command, cwd=folder, env=self.env, capture_output=True, text=True, check=False, timeout=300
            )
            if done.returncode:
                return [done.stderr.strip()[-2000:]], 0.0
        return [], time.monotonic() - started

    def lowest(self) -> list[str]:
        try:
            python = self.make("lowest", HERE / "lowest.txt")
        except RuntimeError as error:
            return [str(error)]
        command = [
            str(python),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not postgres and not redis",
        ]
        done = subprocess.run(
            [*command, *LOWEST_TESTS], cwd=ROOT, env=self.env, capture_output=True, text=True, check=False
        )
        return [done.stdout.strip()[-3000:]] if done.returncode else []


def check_archives(report: Report, folder: Path) -> Path:
    files = tracked(ROOT)
    trees = [copy_of(ROOT, files, folder / name / "stroma") for name in ("one", "another-folder")]
    built = [build(tree, tree.parent / "dist", "sdist", "wheel") for tree in trees]
    names = [[path.name for path in paths] for paths in built]
    different = [a.name for a, b in zip(*built, strict=True) if digest(a) != digest(b)]
    report.tell(f"built twice, the same byte for byte: {', '.join(names[0])}", different)
    sdist, wheel = sorted(built[0], key=lambda path: path.suffix == ".whl")
    unpacked = folder / "unpacked"
    for name, data in contents(sdist).items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(data)
    (again,) = build(unpacked, folder / "again", "wheel")
    report.tell(
        "the wheel from the sdist is that wheel", [] if digest(again) == digest(wheel) else [again.name]
    )
    report.tell("what is in them", wrong_contents(sdist) + wrong_contents(wheel))
    findings = {name: (ROOT / name).read_bytes() for name in files}
    for archive in (sdist, wheel):
        findings |= {f"{archive.name}: {name}": data for name, data in contents(archive).items()}
    report.tell("nothing of this machine in any file", leaks(findings, private()))
    twine = [os.environ["STROMA_TOOLS"], "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(twine, capture_output=True, text=True, check=False)
    report.tell("twine check --strict", [done.stdout + done.stderr] if done.returncode else [])
    bill = bill_of_materials(PROJECT, (HERE / "newest.txt").read_text(), [sdist, wheel])
    beside = {"sbom.cdx.json": bill, "attestation-statement.json": statement([sdist, wheel])}
    PREPARED.mkdir(parents=True, exist_ok=True)
    for name, instance in beside.items():
        (PREPARED / name).write_text(json.dumps(instance, indent=2) + "\n")
    report.tell(
        f"bill of materials and statement to attest, in {PREPARED.relative_to(ROOT)}",
        wrong_bill(bill, PROJECT),
    )
    return wheel


def main(argv: list[str]) -> int:
    extras = ["bare", *PROJECT["optional-dependencies"]]
    parser = argparse.ArgumentParser(
        prog="./dev release-check", description=(__doc__ or "").partition("\n")[0]
    )
    others = ["readme", "lowest"]
    parser.add_argument(
        "--only", nargs="+", choices=[*extras, *others], metavar="EXTRA", help=", ".join([*extras, *others])
    )
    parser.add_argument("--no-installs", action="store_true", help="only build, and look into what was built")
    options = parser.parse_args(argv)
    report = Report()
    git = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    wrong = disagreement(PROJECT["version"], (ROOT / "CHANGELOG.md").read_text(), git.stdout.split())
    report.tell(f"version {PROJECT['version']}, CHANGELOG.md and tags agree", wrong)
    known = advisories()
    pinned = [pin for file in PINNED for pin in pins((ROOT / file).read_text())]
    report.tell(
        f"no release with one of {len(known)} known advisories (./dev audit)", affected(pinned, known)
    )
    with tempfile.TemporaryDirectory(prefix="stroma-release-") as name:
        wheel = check_archives(report, Path(name))
        environments = Environments(Path(name), wheel)
        for extra in [] if options.no_installs else options.only or [*extras, *others]:
            if extra == "readme":
                wrong, seconds = environments.readme()
                report.tell(
                    f"installed with pip: the first example of the docs, after {seconds:.1f} s", wrong
                )
            elif extra == "lowest":
                report.tell("the tests with the lowest releases", environments.lowest())
            else:
                suffix = "" if extra == "bare" else f"[{extra}]"
                report.tell(f"installed: {PROJECT['name']}{suffix}", environments.smoke(extra))
    print(f"failed: {', '.join(report.failed)}" if report.failed else "all of it holds")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
