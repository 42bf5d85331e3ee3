"""Defines `evenkeel certify`: thresholds that keep a promise of accuracy."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example, output_options

__all__ = ["certify"]

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog=example(
        "evenkeel certify gateway.yaml --images labelled/ --min-accuracy .80 --min-accuracy .82",
        "evenkeel certify gateway.yaml --images photos/ --min-agreement .97 --figure curve.png",
        "evenkeel certify gateway.yaml --images test.parquet --split test --max-accuracy-drop .01 --guarantee .99",
        "evenkeel certify gateway.yaml --audited audits.jsonl --min-agreement .97     # anew, from live traffic",
    ),
)
@click.argument("config", type=_FILE)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Images that neither model learned from: folder tree, Parquet, npz or IDX.",
)
@click.option(
    "--recorded",
    type=_FILE,
    help="Answers recorded before, in place of images: npz with light [n, classes], accurate [n], and where known "
    "labels [n] and loss [n], the share of lost packets.",
)
@click.option("--audited", type=_FILE, help="Audit file of a gateway, in place of images.")
@click.option("--min-accuracy", type=float, multiple=True, help="Least share of right answers; may be given again.")
@click.option(
    "--max-accuracy-drop",
    type=float,
    multiple=True,
    help="Largest drop of accuracy against the accurate model alone; may be given again.",
)
@click.option(
    "--min-agreement",
    type=float,
    multiple=True,
    help="Least share of answers that the accurate model would give too; needs no labels; may be given again.",
)
@click.option(
    "--guarantee",
    type=float,
    default=0.95,
    show_default=True,
    help="Probability, over calibration sets, that a threshold keeps its promise.",
)
@click.option(
    "--score",
    type=click.Choice(["max_probability", "margin"]),
    help="Score that decides; the default is the one that offloads less on the tuning split.",
)
@click.option("--model", help="Name of the light model, where the configuration has several.")
@click.option(
    "--labels", default="auto", show_default=True, help="Column, array or file that holds the labels, or none."
)
@click.option("--split", help="Part of the images to read, e.g. test; all for every part.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of images to read.")
@click.option("--out", type=_FILE, default=Path("certificate.json"), show_default=True, help="File to write it to.")
@click.option("--yaml", type=_FILE, help="File to write the thresholds to as plain YAML, for other edge endpoints.")
@click.option("--days", type=float, default=30.0, show_default=True, help="Days until the certificate expires.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed that deals out the splits.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Processor threads to use.")
@output_options("json", "markdown", "figure")
def certify(**arguments: Any) -> None:
    """Find the thresholds that keep promises of accuracy, and write their certificate.

    CONFIG is a gateway's configuration (YAML) with a code of kind cascade, or a collage whose fills are certified. The
    images are dealt into a tuning, a calibration and a test split. A promise that cannot be shown is not certified:
    the answer says about how many images would do.
    """
    from evenkeel.edge.command import CertifyArguments, run_certify

    run_certify(CertifyArguments(**arguments))
