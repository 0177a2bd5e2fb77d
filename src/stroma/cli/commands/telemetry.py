"""`stroma telemetry`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from stroma.cli.errors import Code, Problem
from stroma.cli.output import emit_fields, err, out


@click.group()
def telemetry() -> None:
    """Assets for the exporters of OpenTelemetry, Prometheus, Datadog and Sentry."""


@telemetry.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.assets/1".')
def assets(directory: Path, force: bool, as_json: bool) -> None:
    """Write dashboards and alert rules into DIR, and print their paths.

    A Grafana dashboard, Prometheus alert and recording rules with their unit tests (promtool test rules), a
    Datadog dashboard.
    """
    sources = [asset for asset in files("stroma.telemetry").joinpath("assets").iterdir() if asset.is_file()]
    contents = {directory / one.name: one.read_bytes() for one in sorted(sources, key=lambda one: one.name)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        changed = [path for path, data in contents.items() if path.exists() and path.read_bytes() != data]
        if changed and not force:
            raise Problem(
                f"{', '.join(map(str, changed))} {'is' if len(changed) == 1 else 'are'} there and not "
                "what would be written",
                "look at the difference, then write over it with --force, or give another directory",
            )
        for path, data in contents.items():
            path.write_bytes(data)
    except OSError as error:
        raise Problem(
            f"cannot write into {directory}: {error.strerror or error}",
            "give a directory that you may write to",
            code=Code.ENVIRONMENT,
        ) from error
    if as_json:
        emit_fields("stroma.assets/1", paths=[str(path) for path in contents])
        return
    for path in contents:
        out.line(str(path))
    err.line("import the dashboards; add the rules to rule_files in prometheus.yml")
