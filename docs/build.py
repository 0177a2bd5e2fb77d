"""Build the site: `./dev docs [FOLDER]` (build/site, if no folder is given).

It is made of the pages under docs/, of the changelog and the like beside them, and of the sources that pages link to. They are
laid out in a folder of their own, with links that hold there, and the generator is strict: a warning is an error. Afterwards
the site is checked: every link and anchor leads somewhere, nothing is loaded from elsewhere, images have a text, headings
come in order. The site works from any web server and from the disk, search included.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WORK = ROOT / "build"

#: Files beside docs/ that are pages of the site.
BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
#: The first page here is the one of the repository there.
SAME = {"README.md": "index.md"}


def how_to_groups() -> dict[str, list[str]]:
    """Return the how-to pages by group, as the index of them has both."""
    groups: dict[str, list[str]] = {}
    for line in (DOCS / "howto" / "index.md").read_text("utf-8").splitlines():
        if heading := re.match(r"\| \*\*(.+)\*\* \|", line):
            pages = groups.setdefault(f"How-to/{heading[1]}", [])
        elif page := re.match(r"\| \[.+\]\(([\w-]+\.md)\) \|", line):
            pages.append(f"howto/{page[1]}")
    return groups


#: The order of the pages, by what readers want to do. "A/B" is the group B inside the section A. An entry is a page, or all pages
#: of a folder that are not named here. A page that does not exist is skipped; a page without a line here is listed under "More".
NAV: dict[str, list[str]] = {
    "Start": ["index.md", "install.md", "examples.md", "comparison.md"],
    "Tutorial": ["tutorial/"],
    "How-to": ["howto/index.md"],
    **how_to_groups(),
    "How-to/Operate and test": ["ui.md", "replay.md", "testing.md"],
    "How-to/Move to Stroma": ["migration/index.md", "migration.md", "migration/"],
    "Concepts": [
        "concepts/index.md",
        "concepts/attempts.md",
        "concepts/contracts.md",
        "concepts/failures.md",
        "concepts/",
    ],
    "Concepts/In depth": [
        "repair.md",
        "checks.md",
        "prices.md",
        "limits.md",
        "map.md",
        "streaming.md",
        "durability.md",
        "guarantees.md",
    ],
    "Integrations": ["providers.md", "temporal.md"],
    "Integrations/Stores": [
        "stores/index.md",
        "stores/sqlite.md",
        "stores/postgres.md",
        "stores/redis.md",
        "stores/memory.md",
        "stores/",
    ],
    "Integrations/Telemetry": ["telemetry.md", "telemetry/"],
    "Integrations/Agent frameworks": ["adapters.md", "adapters/"],
    "Reference": [
        "reference/index.md",
        "reference/",
        "cli.md",
        "reference/commands.md",
        "json.md",
        "errors.md",
    ],
    "Project": [
        "changelog.md",
        "performance.md",
        "scale.md",
        "crash-tests.md",
        "contributing.md",
        "code-of-conduct.md",
        "security.md",
        "architecture.md",
        "ui-style.md",
        "mutation.md",
        "releasing.md",
    ],
}

#: Pages of the site that the navigation and the search leave out: decisions, which the page about the architecture links to.
UNLISTED = "adr/"


# ---------------------------------------------------------------------- what the site is made of


def pages() -> dict[str, Path]:
    """Return the Markdown pages by their place in the site."""
    found = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    found |= {name: ROOT / beside for beside, name in BESIDE.items() if (ROOT / beside).exists()}
    return found


def navigation(names: set[str]) -> dict[str, list[str]]:
    """Return the pages of each section, in order; each page once."""
    named = {name for entries in NAV.values() for name in entries}
    nav: dict[str, list[str]] = {}
    for section, entries in NAV.items():
        found: list[str] = []
        for entry in entries:
            inside = (
                sorted(n for n in names - named if posixpath.dirname(n) == entry[:-1])
                if entry.endswith("/")
                else [entry]
            )
            found += [name for name in inside if name in names and name not in found]
        nav[section] = found
    more = sorted(
        name
        for name in names - {name for found in nav.values() for name in found}
        if not name.startswith(UNLISTED)
    )
    return {section: found for section, found in {**nav, "More": more}.items() if found}


def title_of(text: str) -> str:
    """Return the first heading of a page."""
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return re.sub(r"[`*]", "", match[1]) if match else "?"


class Sources:
    """Files of the repository that pages link to; each becomes a page with its text."""

    def __init__(self) -> None:
        self.linked: set[str] = set()

    def page(self, path: str) -> str:
        self.linked.add(path)
        return f"source/{path}.md"


@functools.cache
def lines_of(path: str) -> dict[str, int]:
    """Return the lines of the functions and classes of a Python file, which a link to it may name."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name: node.lineno for node in ast.walk(tree) if isinstance(node, kinds)}


LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def relinked(text: str, name: str, path: Path, known: dict[str, Path], sources: Sources) -> str:
    """Return the text of a page with links that work in the site."""
    where = {source: target for target, source in known.items()}
    where |= {ROOT / beside: target for beside, target in SAME.items()}

    def target_of(link: str) -> str:
        link, anchor = urldefrag(link)
        if not link or ":" in link.split("/")[0]:
            return f"{link}#{anchor}" if anchor else link
        there = Path(os.path.normpath(path.parent / unquote(link)))
        if there in where:
            target = where[there]
            if there == ROOT / "README.md":
                anchor = ""  # The first page of the site has other headings.
        elif there.is_dir():
            target = f"{there.relative_to(DOCS).as_posix()}/index.md"
        elif there.is_relative_to(DOCS):
            target = there.relative_to(DOCS).as_posix()
        else:
            file = there.relative_to(ROOT).as_posix()
            target = sources.page(file)
            line = lines_of(file).get(anchor) if anchor and file.endswith(".py") else None
            anchor = f"__codelineno-0-{line}" if line else ""
        relative = posixpath.relpath(target, posixpath.dirname(name) or ".")
        return f"{relative}#{anchor}" if anchor else relative

    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if number % 2 else LINK.sub(lambda m: m[1] + target_of(m[2]) + m[3], part)
        for number, part in enumerate(parts)
    )


#: The head of a page that the search leaves out.
NO_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"


def lay_out(folder: Path) -> dict[str, list[str]]:
    """Write all pages into a folder, and return the navigation."""
    shutil.rmtree(folder, ignore_errors=True)
    known, sources, titles = pages(), Sources(), dict[str, str]()
    adrs = {
        name: title_of(path.read_text("utf-8")) for name, path in known.items() if name.startswith("adr/")
    }
    texts = {name: path.read_text("utf-8") for name, path in known.items()}
    decisions = "\n".join(f"- [{title}]({posixpath.basename(name)})" for name, title in adrs.items())
    known["adr/index.md"] = DOCS / "adr" / "index.md"
    texts["adr/index.md"] = (
        f"# Decisions\n\nDecisions about the design, each with its reasons.\n\n{decisions}\n"
    )
    for name, text in texts.items():
        titles[name] = title_of(text)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        head = NO_SEARCH if name.startswith(UNLISTED) else ""
        target.write_text(head + relinked(text, name, known[name], known, sources), "utf-8")
    for linked in sorted(sources.linked):
        target = folder / sources.page(linked)
        target.parent.mkdir(parents=True, exist_ok=True)
        language = "python" if linked.endswith(".py") else "text"
        code = (ROOT / linked).read_text("utf-8")
        target.write_text(f"{NO_SEARCH}# {linked}\n\n````` {language}\n{code}`````\n", "utf-8")
    for picture in DOCS.rglob("*"):
        if picture.suffix in (".svg", ".png"):
            target = folder / picture.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    (assets / "own.css").write_text(STYLE, "utf-8")
    (assets / "own.js").write_text(SCRIPT, "utf-8")
    return navigation(set(texts))


#: Contrast of small text, and underlined links.
STYLE = """\
.md-typeset a:not(.headerlink):not(.md-button) { text-decoration: underline; text-underline-offset: 0.15em }
.md-typeset img[src$=".svg"] { max-width: 100%; height: auto }
.md-nav .md-nav__link--active, .md-nav .md-nav__link--active .md-ellipsis { color: #2b3aa8 }
[data-md-color-scheme="slate"] .md-nav .md-nav__link--active,
[data-md-color-scheme="slate"] .md-nav .md-nav__link--active .md-ellipsis { color: #c3cbff }
.md-typeset pre { overflow-x: auto }
.md-typeset pre > code { overflow: visible; width: max-content; min-width: 100% }
/* 110 columns, the length of a line of code, fit a window of 1,280 pixels. Messages in outputs may be longer. */
@media screen and (min-width: 76.25em) {
  .md-grid { max-width: 72rem }
  .md-main .md-sidebar--primary { width: 11rem }
  .md-main .md-sidebar--secondary { width: 9.5rem }
  .md-content__inner { margin-inline: .8rem !important }
  .md-typeset pre > code { font-size: .8em; padding-inline: .7em }
  .md-typeset :is(.language-console, .language-text) pre > code { white-space: pre-wrap; width: auto }
}
.md-typeset .doc-labels code { color: var(--md-default-fg-color); opacity: 1 }
"""

#: A table that is too wide for a narrow screen scrolls in reach of the keyboard.
SCRIPT = """\
const reach = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach(
  (wide) => wide.scrollWidth > wide.clientWidth ? wide.setAttribute("tabindex", "0") : wide.removeAttribute("tabindex"))
addEventListener("load", reach)
addEventListener("resize", reach)
"""

#: Output of the generator that hinders readers with assistive technology, with its replacement.
CORRECTIONS = (
    (re.compile(r"<th(?: [^>]*)?></th>"), "<td></td>"),
    # Scrolling content must be reachable by keyboard; see the style of `pre`.
    (re.compile(r"<pre\b"), '<pre tabindex="0"'),
    # Anchors of lines, which are invisible.
    (re.compile(r'<a (?=(?:id|name)="[^"]*__codelineno)'), '<a aria-hidden="true" tabindex="-1" '),
    # Roles of another markup, in docstrings.
    (re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)"), ""),
)


# ---------------------------------------------------------------------- the generator


def configuration(nav: dict[str, list[str]], folder: Path, site: Path) -> str:
    """Return zensical.toml: the navigation, and no resource of other hosts."""
    tree: dict[str, list[str]] = {}
    for section, names in nav.items():
        section, _, group = section.partition("/")
        entries = [json.dumps(name) for name in names]
        tree.setdefault(section, []).extend(
            [f"{{ {json.dumps(group)} = [{', '.join(entries)}] }}"] if group else entries
        )
    sections = [
        f"  {{ {json.dumps(section)} = [{', '.join(entries)}] }}," for section, entries in tree.items()
    ]
    return "\n".join(
        [
            "[project]",
            'site_name = "Stroma"',
            'site_description = "Guarantees around the steps of an LLM or agent pipeline, and every step visible."',
            f"docs_dir = {json.dumps(os.path.relpath(folder, WORK))}",
            f"site_dir = {json.dumps(os.path.relpath(site, WORK))}",
            "use_directory_urls = false",  # Links then work from the disk, too.
            'extra_css = ["assets/own.css"]',
            'extra_javascript = ["assets/own.js"]',
            "nav = [",
            *sections,
            "]",
            CONFIGURATION.format(src=json.dumps(os.path.relpath(ROOT / "src", WORK))),
        ]
    )


CONFIGURATION = """
[project.theme]
language = "en"
font = false
features = ["content.code.copy", "navigation.footer", "navigation.indexes", "navigation.sections", "navigation.top", "search.highlight"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle.icon = "lucide/sun"
toggle.name = "Switch to dark mode"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle.icon = "lucide/moon"
toggle.name = "Switch to light mode"

[project.extra]
generator = false

[project.markdown_extensions]
attr_list = {{}}
tables = {{}}
toc.permalink = true
toc.slugify = {{ object = "pymdownx.slugs.slugify", kwds = {{ case = "lower" }} }}
pymdownx.highlight.anchor_linenums = true
pymdownx.highlight.line_spans = "__span"
pymdownx.highlight.pygments_lang_class = true
pymdownx.superfences = {{}}

[project.plugins.search]

[project.plugins.mkdocstrings.handlers.python]
paths = [{src}]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
heading_level = 2
members_order = "source"
filters = ["!^_"]
merge_init_into_class = true
separate_signature = true
show_root_heading = true
show_root_full_path = false
show_symbol_type_heading = true
show_source = true
show_signature_annotations = true
signature_crossrefs = true
line_length = 100
"""


#: The search of a page that was opened from the disk. The theme loads this script there, in place of search.json, and then starts
#: a worker by the address of its file. Browsers refuse that for a page without an origin, so the worker starts from its text.
SEARCH = """\
var __index = {index}
{{
  const text = {worker}
  const Original = window.Worker
  window.Worker = function (address, options) {{
    const own = String(address).includes("/workers/search.")
    return new Original(own ? URL.createObjectURL(new Blob([text], {{ type: "text/javascript" }})) : address, options)
  }}
}}
"""


def search_script(index: str, worker: str) -> str:
    """Return the script with the index of the search and the text of its worker."""
    # U+2028 and U+2029 are line ends to old parsers of scripts, not to JSON.
    safe = index.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return SEARCH.format(index=safe, worker=json.dumps(worker))


def report_step(step: str) -> None:
    """Print the progress, which is no output of the build."""
    print(f"docs: {step}", file=sys.stderr, flush=True)


def build(site: Path) -> None:
    WORK.mkdir(exist_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    report_step("1/3 laying out the pages")
    nav = lay_out(WORK / "pages")
    config = WORK / "zensical.toml"
    config.write_text(configuration(nav, WORK / "pages", site), "utf-8")
    report_step(f"2/3 building the site of {sum(map(len, nav.values()))} pages, up to a minute")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(config)]
    done = subprocess.run(
        command, cwd=WORK, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    # The generator prints problems of docstrings, but does not fail for them.
    if done.returncode or re.search(r"^griffe: ", said, re.MULTILINE):
        raise SystemExit(f"{said}\nthe site was not built; what is above says why")
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        for pattern, instead in CORRECTIONS:
            text = pattern.sub(instead, text)
        page.write_text(text, "utf-8")
    (worker,) = site.glob("assets/javascripts/workers/search.*.js")
    index = (site / "search.json").read_text("utf-8")
    (site / "search.js").write_text(search_script(index, worker.read_text("utf-8")), "utf-8")


def main(argv: list[str]) -> int:
    site = Path(argv[0]).absolute() if argv else WORK / "site"
    build(site)
    # Beside this file, whoever runs it.
    import look

    report_step("3/3 reading every page: links, pictures, headings")
    wrong = look.look(site, Path(argv[1]) if len(argv) > 1 else None)
    for problem in wrong:
        print(problem)
    print(f"{len(wrong)} problems" if wrong else f"open {site / 'index.html'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
