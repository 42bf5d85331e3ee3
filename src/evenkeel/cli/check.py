"""Defines `evenkeel check`: what is wrong with a configuration, before anything is started with it."""

import sys
from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options
from evenkeel.version import __version__

__all__ = ["check", "is_edge"]


def is_edge(raw: object) -> bool:
    """Tells whether a configuration is of `evenkeel edge`, by a field that only those have."""
    return isinstance(raw, dict) and bool({"light", "data_centre"} & raw.keys())


@click.command(
    epilog=example(
        "evenkeel check gateway.yaml && evenkeel serve gateway.yaml",
        "evenkeel check edge.yaml --resolve",
    )
)
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--resolve", is_flag=True, help="Look up the names of other machines, too.")
@output_options("json")
def check(config: Path, resolve: bool, outputs: Any) -> None:
    """Say all that is wrong with a configuration of `evenkeel serve` or `evenkeel edge`, and in which lines.

    Fields, model cards and their files, whether codes fit the classifier, certificates, keys and addresses are looked
    at; nothing is started. The exit code is 2 if anything is wrong.
    """
    from evenkeel.edge.node import edge_problem, read_edge_config
    from evenkeel.figures.outputs import write_json
    from evenkeel.schema import ProblemsError
    from evenkeel.serving.check import find_problems
    from evenkeel.serving.config import find_lines, load_raw, read_config
    from evenkeel.serving.trusted import exposures
    from evenkeel.settings import joined

    outputs.check()
    raw = load_raw(config)
    line = find_lines(config)
    edge = is_edge(raw)
    try:
        settings = (read_edge_config if edge else read_config)(raw, config.parent)
        found = find_problems(settings, resolve=resolve)
        problems = [edge_problem(one) for one in found] if edge else found
    except ProblemsError as error:
        problems = list(error.problems)
    problems.sort(key=lambda one: line(one.place))
    rows = [{"line": line(one.place), "field": joined(one.place), "problem": one.text} for one in problems]
    warnings = [] if problems else exposures(settings)
    if outputs.json_path is not None:
        document = {"evenkeel": __version__, "config": config, "problems": rows, "warnings": warnings}
        write_json(outputs.json_path, document)
    for row in rows:
        field = row["field"] or "configuration"
        click.echo(f"{config}:{row['line']}: {field}: {row['problem']}", err=True)
    if rows:
        sys.exit(2)
    for warning in warnings:
        click.echo(f"{config}: warning: {warning}", err=True)
    for one in settings.each:
        nodes = f"{one.replicas.total} replicas, {one.backups.total} backups"
        click.echo(f"{config}: {one.name or one.card().name} ({nodes}, {one.policy.name}): nothing is wrong")
