"""The command line: one thin function per command.

Exit codes: 0 done, 1 the work failed, 2 the command line or a configuration is wrong.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from evenkeel.cli.lab import lab
from evenkeel.cli.plan_training import training
from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.processes import end_with_parent
from evenkeel.version import __version__

__all__ = ["main"]


class _Commands(click.Group):
    """Turns our own errors into one line and an exit code, for every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            _stop(error, 2)
        except EvenkeelError as error:
            _stop(error, 1)


def _stop(error: Exception, code: int) -> NoReturn:
    click.echo(f"evenkeel: {error}", err=True)
    sys.exit(code)


def _example(*lines: str) -> str:
    """An epilog that click leaves as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="evenkeel")
def main() -> None:
    """Answers on time although a machine is slow."""


main.add_command(lab)


@main.group()
def plan() -> None:
    """Predict what a change would gain."""


plan.add_command(training)

_NODE_OPTIONS = (
    click.option("--replicas", type=click.IntRange(1), help="Number of workers to start with the classifier."),
    click.option("--backups", type=click.IntRange(0), help="Number of workers to start with the Collage-CNNs."),
    click.option(
        "--policy",
        help="What to do about late replicas: none, replicate, replicate-all, hedge, collage or collage+hedge.",
    ),
    click.option(
        "--fill-after", metavar="WHEN", help="Time after which a fill may answer: p95 (a live quantile) or 25ms."
    ),
    click.option(
        "--hedge-after",
        metavar="WHEN",
        help="Time after which another replica is asked: p95 (a live quantile) or 25ms.",
    ),
    click.option("--min-confidence", type=float, help="Lowest confidence (0..1) at which a fill is used."),
    click.option("--max-extra-load", type=float, help="Largest number of hedges, as a share of all items."),
    click.option(
        "--group-wait", metavar="TIME", help="Time that an idle backup waits for more items before it starts."
    ),
    click.option(
        "--deadline", metavar="TIME", help="Longest time an item may take; after that it is answered with 504."
    ),
    click.option(
        "--delay", metavar="LAW", help="Delay injected into the workers, for experiments: two-mode:scale=0.3."
    ),
)


def _node_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_NODE_OPTIONS):
        function = option(function)
    return function


_POLICY_FLAGS = ("fill_after", "hedge_after", "min_confidence", "max_extra_load", "group_wait", "deadline")


@main.command(
    epilog=_example(
        "evenkeel serve                                  # the embedded CIFAR-10 pair on 127.0.0.1:8000",
        "evenkeel serve --replicas 9 --backups 1 --policy collage+hedge",
        "evenkeel serve gateway.yaml --port 9000         # flags win over the file",
        "curl -s localhost:8000/v2/models/cifar10-base",
    )
)
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", help="Model card (.json) of the classifier, or the name of a shipped one.")
@click.option("--host", help="Address to listen on; the default is loopback.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@_node_options
@click.option("--parent-pid", type=int, hidden=True, help="Process with which this one ends.")
def serve(config: Path | None, parent_pid: int | None, **flags: Any) -> None:
    """Serve a classifier behind the gateway, over the Open Inference Protocol.

    CONFIG is a YAML file; docs/how-to/serve.md lists its fields. Without one, flags and defaults alone.
    """
    from evenkeel.serving.config import load_raw, read_config

    if parent_pid is not None:
        end_with_parent(parent_pid)
    raw, folder = ({}, Path()) if config is None else (load_raw(config), config.parent)
    try:
        settings = read_config(_with_flags(raw, flags), folder)
    except ConfigurationError as error:
        raise ConfigurationError(f"{config}: {error}" if config else str(error)) from None
    _run_server(settings)


def _with_flags(raw: Any, flags: dict[str, Any]) -> Any:
    """The mapping of a configuration file with command-line flags laid over it."""
    if not isinstance(raw, dict):
        return raw  # refused by name when it is read
    given = {name: value for name, value in flags.items() if value is not None}
    policy = raw.get("policy", {})
    policy = {"name": policy} if isinstance(policy, str) else policy
    for name in _POLICY_FLAGS:
        if name in given and isinstance(policy, dict):
            policy = {**policy, name: given.pop(name)}
    if "policy" in given:
        policy = {**(policy if isinstance(policy, dict) else {}), "name": given.pop("policy")}
    merged = {**raw, **given}
    if policy:
        merged["policy"] = policy
    return merged


def _run_server(settings: Any) -> None:
    import logging

    import uvloop

    from evenkeel.serving.service import serve as run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def started(url: str) -> None:
        nodes = f"{settings.replicas.total} replicas, {settings.backups.total} backups"
        click.echo(f"evenkeel: {settings.name or settings.card().name} on {url} ({nodes}, {settings.policy.name})")

    uvloop.run(run(settings, started))


@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def worker(arguments: tuple[str, ...]) -> None:
    """Run one worker that a gateway reaches by address."""
    from evenkeel.backends.worker.main import main as run

    sys.exit(run(list(arguments)))


@main.command(
    epilog=_example(
        "evenkeel fit --classifier model.onnx --images photos/ --grid 3 --cost 0.6 --out fitted/",
        "evenkeel fit --classifier card.json --images train.parquet --split train --grid 2,3,4 --out fitted/",
        "evenkeel fit --classifier model.onnx --images photos/ --out fitted/ --resume",
    ),
)
@click.option("--classifier", required=True, help="ONNX file, model card (.json) or name of a shipped model.")
@click.option(
    "--images",
    required=True,
    type=click.Path(path_type=Path),
    help="Images to learn from: folder tree, Parquet, npz or IDX. Labels are not needed; they only serve to report "
    "accuracy and to calibrate.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
@click.option(
    "--grid", default="3", show_default=True, metavar="N[,N...]", help="Number of tiles along one side of a collage."
)
@click.option(
    "--cost",
    type=float,
    default=0.6,
    show_default=True,
    help="Largest cost of one collage pass, as a multiple of one pass of the classifier.",
)
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp32"]),
    default="int8",
    show_default=True,
    help="Number format of the convolutions in the model file.",
)
@click.option("--shared", is_flag=True, help="Train one network for all grids, as large as the first grid can afford.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Minutes to train each network.")
@click.option("--epochs", type=float, help="Number of passes over the images to train for, instead of minutes.")
@click.option(
    "--rate", type=float, help="Learning rate at the start; take a lower one for a longer training and with --start."
)
@click.option(
    "--tiles",
    type=int,
    help="Number of tiles in one step of training; the default is at most 500. Fewer learn faster at first.",
)
@click.option(
    "--start",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of an earlier fit whose weights to start from.",
)
@click.option(
    "--views",
    type=int,
    default=4,
    show_default=True,
    help="Number of augmented views of each image that the classifier scores.",
)
@click.option(
    "--reach", type=click.IntRange(0), help="Largest shift of a view in pixels; the default is a tenth of the side."
)
@click.option(
    "--mirror/--no-mirror",
    default=True,
    show_default=True,
    help="Whether some views are mirrored; switch it off where left and right differ.",
)
@click.option(
    "--held-out", type=click.IntRange(100), help="Number of images kept for calibration; the default is a twentieth."
)
@click.option(
    "--labels", default="auto", show_default=True, help="Column, array or file that holds the labels, or none."
)
@click.option("--split", help="Part of the images to read, where a Parquet file has a column `split`.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of images to read.")
@click.option("--more-images", type=click.Path(path_type=Path), help="More images to learn from, whatever they show.")
@click.option("--more-split", help="Part of --more-images to read.")
@click.option("--test-images", type=click.Path(path_type=Path), help="Images to measure on, instead of held-out ones.")
@click.option("--test-split", help="Part of --test-images, or of --images, to measure on.")
@click.option(
    "--side",
    metavar="N|HxW",
    help="Side of the classifier's input in pixels, or height and width, where its file leaves them open.",
)
@click.option(
    "--layout",
    type=click.Choice(["NHWC", "NCHW"]),
    help="Layout of the classifier's input, where its file leaves it open.",
)
@click.option("--bgr", is_flag=True, help="The classifier takes the colours in the order blue, green, red.")
@click.option("--output", help="Name of the classifier's output that holds the scores, where several may.")
@click.option(
    "--classes",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the names of the classifier's classes, one a line, in the order of its scores.",
)
@click.option("--scale", type=float, help="Factor that turns pixels 0..255 into a float input; the default is 1/255.")
@click.option("--mean", type=float, nargs=3, help="Mean of each colour, subtracted after scaling.")
@click.option("--std", type=float, nargs=3, help="Standard deviation of each colour, by which pixels are then divided.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Continue a fit that was stopped; it ends with the same weights.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the cards to."
)
def fit(**arguments: Any) -> None:
    """Train Collage-CNNs for your own classifier, from your own images, without labels."""
    from evenkeel.vision.fit.command import FitArguments, run_fit

    run_fit(FitArguments(**arguments))


@main.group()
def bench() -> None:
    """Measure policies, fills, codes and gradients."""


@bench.command(
    "serving",
    epilog=_example(
        "evenkeel bench serving --policy none --policy collage+hedge --requests 2000 --json out.json",
        "evenkeel bench serving --policy none@10 --policy hedge@10 --policy collage+hedge --simulated",
        "evenkeel bench serving --url http://127.0.0.1:8000 --rate 50 --requests 500",
    ),
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Policy to compare; may be repeated. none@10 means ten replicas and no backup.",
)
@click.option(
    "--delay", default="two-mode:scale=0.3", show_default=True, metavar="LAW", help="Law by which tasks are late."
)
@click.option(
    "--load", "loads", type=float, multiple=True, help="Load as a share of the replicas' time; may be repeated."
)
@click.option("--rate", "rate_per_s", type=float, help="Requests per second, instead of a load.")
@click.option("--requests", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--replicas", type=click.IntRange(1), default=9, show_default=True)
@click.option("--backups", type=click.IntRange(0), default=1, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Number of requests that arrive together."
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="FAULT",
    help="Fault to cause in a worker: freeze:replica=3,at=5s,for=2s.",
)
@click.option("--url", help="Address of a running server to measure, instead of starting one.")
@click.option("--simulated", is_flag=True, help="Run on a virtual clock with fake workers.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
@click.option(
    "--records", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep a record of every request in."
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="File to write an HTML report to.")
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="File to draw the histograms to (PNG or SVG)."
)
def bench_serving(**arguments: Any) -> None:
    """Compare policies under the same arrivals and the same delays."""
    from evenkeel.bench.serving.command import run_bench

    run_bench(arguments)


@bench.command(
    "fills",
    epilog=_example(
        "evenkeel bench fills                            # the shipped models on the shipped images",
        "evenkeel bench fills --images cifar10.parquet --split test --partial --json fills.json --figure fills.png",
        "evenkeel bench fills --classifier base.json --images test/ --collage 3x3.json \\",
        "  --parity-sum k=2:sum2.json --parity-concat k=4:concat4.json --cheap small.json:9 --berrut 4,8,9",
    ),
)
@click.option(
    "--classifier",
    default="cifar10-base",
    show_default=True,
    help="Classifier to measure beside: a card, an ONNX file or a shipped name.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Images to ask about: folder, Parquet, npz or IDX; the default is the shipped 400.",
)
@click.option("--split", help="Part of the images to read, e.g. test.")
@click.option(
    "--labels", default="auto", show_default=True, help="Column, array or file that holds the labels, or none."
)
@click.option("--limit", type=click.IntRange(1), help="Largest number of images to read.")
@click.option("--collage", "collages", multiple=True, metavar="CARD", help="Card of a Collage-CNN; may be repeated.")
@click.option(
    "--detector", "detectors", multiple=True, metavar="CARD", help="Card of the paper's detector; may be repeated."
)
@click.option(
    "--parity-sum",
    "parity_sums",
    multiple=True,
    metavar="[k=K:]CARD",
    help="Card of a parity model (ParM) with the sum encoder; may be repeated.",
)
@click.option(
    "--parity-concat",
    "parity_concats",
    multiple=True,
    metavar="[k=K:]CARD",
    help="Card of a parity model (ParM) with concatenation; may be repeated.",
)
@click.option(
    "--cheap",
    "cheaps",
    multiple=True,
    metavar="CARD:N",
    help="Card of a small classifier that runs on N items as a backup.",
)
@click.option("--berrut", metavar="K,K", help="Sizes of groups for ApproxIFER with one spare: 4,8,9.")
@click.option(
    "--shuffles",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of times that every image is asked.",
)
@click.option("--partial", is_flag=True, help="Measure groups of 1 to N items too.")
@click.option("--same-class", is_flag=True, help="Measure groups of one class too, as an ablation.")
@click.option(
    "--rounds", type=click.IntRange(0), default=100, show_default=True, help="Number of rounds of timing; 0 skips it."
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="File to draw a figure to (PNG or SVG)."
)
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), help="File to write the table to, as Markdown."
)
def bench_fills(**arguments: Any) -> None:
    """Compare what backups answer when replicas are late: accuracy of fills, cost, calibration."""
    from evenkeel.bench.fills.command import run_fills

    run_fills(arguments)


@bench.command(
    "codes",
    epilog=_example(
        "evenkeel bench codes                            # about half a minute",
        "evenkeel bench codes --code thc --code eden:bits=4 --workers 2,4,8 --correlation 0,.5,.95 --figure codes.png",
        "evenkeel bench codes --gradients mlp.npz --gradients convnet.npz --json codes.json",
    ),
)
@click.option(
    "--code",
    "codes",
    multiple=True,
    metavar="CODE",
    help="Code to measure; may be repeated: thc:bits=4,rounding=nearest, lowrank:rank=16+thc:block=512.",
)
@click.option("--workers", default="8", show_default=True, metavar="N[,N...]")
@click.option(
    "--correlation",
    default="0,0.5",
    show_default=True,
    metavar="C[,C...]",
    help="Correlation between the workers' vectors, 0 to 1.",
)
@click.option(
    "--distribution",
    metavar="LAW[,LAW...]",
    help="Law that vectors are made by: gaussian, lognormal-1, lognormal-2, sparse, one-hot, low-rank.",
)
@click.option(
    "--length", type=click.IntRange(1024), default=32768, show_default=True, help="Length of the vectors that are made."
)
@click.option(
    "--gradients",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of gradients recorded by benchmarks/record_gradients.py; may be repeated.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of rounds over which errors are averaged.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="File to draw a figure to (PNG or SVG)."
)
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), help="File to write the tables to, as Markdown."
)
def bench_codes(**arguments: Any) -> None:
    """Compare codes of gradients: error of the mean against the bits that it takes."""
    from evenkeel.bench.codes.command import run_codes

    run_codes(arguments)


@bench.command(
    "gradients",
    epilog=_example(
        "evenkeel bench gradients                        # three minutes: an MLP on made-up images, at 100 Mbit/s",
        "evenkeel bench gradients --mnist train-images-idx3-ubyte.gz --rates 100mbit,1gbit --seeds 3 --records out/",
        "evenkeel bench gradients --tasks convnet --cifar cifar10.parquet --methods thc:bits=2,gradiveq:ratio=2+thc",
        "evenkeel bench gradients --rates unlimited --methods fp32,bf16,thc,pipe+thc --json rows.json",
    ),
)
@click.option(
    "--tasks", default="mlp", show_default=True, metavar="TASK,TASK", help="Tasks to train: mlp, convnet, transformer."
)
@click.option(
    "--methods",
    metavar="METHOD,METHOD",
    help="Methods to compare: fp32, bf16, powersgd:rank=4, thc, lowrank:rank=16+thc:block=512, pipe, pipe+thc, ...",
)
@click.option(
    "--rates",
    metavar="RATE,RATE",
    help="Rates of the links: 100mbit, 1gbit (both need root), unlimited. The default is 100mbit for root.",
)
@click.option("--workers", type=click.IntRange(2, 64), default=4, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of seeds: 0, 1, 2, ...")
@click.option(
    "--steps", type=click.IntRange(2), help="Number of training steps; the default is smaller on made-up data."
)
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), help="Number of passes over the images, instead of steps."
)
@click.option("--batch", type=click.IntRange(1), help="Number of examples per step and worker.")
@click.option(
    "--evaluations",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Number of times that test accuracy is measured.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.3,
    show_default=True,
    help="Points below fp32's accuracy at which the target lies.",
)
@click.option(
    "--mnist", type=click.Path(path_type=Path), help="Images for mlp (IDX, npz, ...); by default they are made up."
)
@click.option(
    "--cifar",
    type=click.Path(path_type=Path),
    help="Images for convnet (Parquet, npz, ...); by default they are made up.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text for transformer; the default is the source of Python's own library.",
)
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=900,
    show_default=True,
    help="Longest time for one training, in seconds.",
)
@click.option(
    "--records",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to keep finished trainings in; a later call continues there.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="File to draw a figure to (PNG or SVG)."
)
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), help="File to write the tables to, as Markdown."
)
def bench_gradients(**arguments: Any) -> None:
    """Compare ways to average gradients: time to accuracy, bytes, and what encoding costs, on real trainings."""
    from evenkeel.bench.gradients.command import run_gradients

    run_gradients(arguments)


@main.command(epilog=_example("evenkeel demo", "evenkeel demo --report report.html --json rows.json"))
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="File to write the HTML report to.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the rows to, as JSON."
)
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="File to draw the histograms to (PNG or SVG)."
)
@click.option(
    "--seconds", type=click.FloatRange(2), default=11, show_default=True, help="Seconds of traffic for each policy."
)
@click.option("--load", type=float, default=0.4, show_default=True, help="Load as a share of the replicas' time.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
def demo(**arguments: Any) -> None:
    """Nine replicas, one backup, real images: five policies compared in a minute and a half."""
    from evenkeel.bench.serving.command import run_demo

    run_demo(**arguments)
