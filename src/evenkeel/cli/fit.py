"""Defines `evenkeel fit`: Collage-CNNs for a user's own classifier."""

from pathlib import Path
from typing import Any

import click

from evenkeel.cli.options import example

__all__ = ["fit"]


@click.command(
    epilog=example(
        "evenkeel fit --classifier model.onnx --images photos/ --grid 3 --cost 0.6 --out fitted/",
        "evenkeel fit --classifier card.json --images train.parquet --split train --grid 2,3,4 --out fitted/",
        "evenkeel fit --classifier model.onnx --images photos/ --out fitted/ --resume",
        "evenkeel fit --classifier model.onnx --images photos/ --grid 1 --cost 0.1 --lossy 0.6 --out light/",
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
    "--grid",
    default="3",
    show_default=True,
    metavar="N[,N...]",
    help="Number of tiles along one side of a collage; 1 makes a light classifier of whole images, for a cascade.",
)
@click.option(
    "--cost",
    type=float,
    default=0.6,
    show_default=True,
    help="Largest cost of one collage pass, as a multiple of one pass of the classifier.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "fresh", "classifier"]),
    default="auto",
    show_default=True,
    help="Weights to begin with: fresh ones, or the classifier's own, run on smaller images; auto tries both.",
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
    "--until",
    type=float,
    metavar="SHARE",
    help="Stop earlier, once the network agrees with the classifier on this share of the held-out images, e.g. 0.9.",
)
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
    "--lossy",
    type=float,
    default=0.0,
    show_default=True,
    help="Largest share of an image that a link loses: learn from what remains of views that cross it too.",
)
@click.option(
    "--jpeg-quality", type=int, default=90, show_default=True, help="Quality of the JPEG on that link, with --lossy."
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
@click.option("--split", help="Part of the images to read, e.g. train; all for every part.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of images to read.")
@click.option("--more-images", type=click.Path(path_type=Path), help="More images to learn from, whatever they show.")
@click.option("--more-split", help="Part of --more-images to read.")
@click.option("--more-limit", type=click.IntRange(1), help="Largest number of --more-images to read.")
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
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to train on; auto takes a GPU where there is one.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Number of processor threads to use."
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of all that is random in a fit.",
)
@click.option("--resume", is_flag=True, help="Continue a fit that was stopped; it ends with the same weights.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="File to write the cards to."
)
def fit(**arguments: Any) -> None:
    """Train Collage-CNNs for your own classifier, from your own images, without labels."""
    from evenkeel.vision.fit.command import FitArguments, run_fit

    run_fit(FitArguments(**arguments))
