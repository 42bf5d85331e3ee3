"""Fits collages to classifiers of others, with their own weights and with fresh ones, and makes one table of it.

    python scripts/measure_own_weights.py --minutes 20 --threads 2 --grids 2,3 --out measured/ \\
      --case "lite0: --classifier lite0.onnx --scale 1 --mean 127 127 127 --std 128 128 128 --labels none
              --images imagenette128.parquet --split train --test-split val"

A case is a name, and options of `evenkeel fit`; it needs test images (`--test-images` or `--test-split`). Every grid
gets both kinds of weights at the same cost and in the same minutes. What is done already is not done again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.cli.fit import fit
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.images.image_set import read_images
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.measure import ModelSession, reliability_table, shuffled_groups
from evenkeel.vision.fit.loop import as_tiles_show

COVERED = 0.7  # share of the fills, the surest, whose agreement is shown by itself


def fitted(options: list[str], folder: Path) -> None:
    """Runs one fit in a process of its own, unless its cards are there."""
    if list(folder.glob("*-collage-*.json")):
        return
    resume = ["--resume"] if (folder / "plan.json").is_file() else []
    command = [sys.executable, "-m", "evenkeel", "fit", *options, "--out", str(folder), *resume]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def tested(options: list[str], folder: Path) -> tuple[BlackBox, NDArray[np.uint8], NDArray[np.int64]]:
    """Gives the classifier of a case, its test images, and its answers to them."""
    given = fit.make_context("fit", [*options, "--out", str(folder)]).params
    form = {name: given[name] for name in ("layout", "output", "scale", "mean", "std", "classes")}
    side = None if given["side"] is None else tuple(int(each) for each in given["side"].lower().split("x"))
    classifier = BlackBox.open(
        given["classifier"],
        threads=given["threads"],
        bgr=given["bgr"],
        side=None if side is None else (side[0], side[-1]),
        **{name: value for name, value in form.items() if value is not None},
    )
    images = read_images(
        given["test_images"] or given["images"],
        height=classifier.height,
        width=classifier.width,
        labels_from="none",
        split=given["test_split"],
        interpolation=classifier.interpolation,
    )
    return classifier, images.pixels, classifier.scores(images.pixels).argmax(1)


def measured(path: Path, classifier: BlackBox, pixels: NDArray[np.uint8], answers: NDArray[np.int64]) -> dict[str, Any]:
    """Measures a collage on images: agreement overall, by class, and of the surest; calibration.

    "itself" is the classifier's agreement with itself, when it sees at full size what a tile shows of an image.
    """
    card: ModelCard = load_card(path)
    code, session = Collage.from_card(card), ModelSession.open(path.parent / card.file)
    groups = shuffled_groups(len(pixels), card.cells, seed=card.grid)
    prepared = ([code.prepare(pixels[item]) for item in group] for group in groups)
    scores = np.concatenate([session(code.spares(items)[0].inputs)[0] for items in prepared])
    truth, found = answers[groups.reshape(-1)], scores.argmax(1)
    confidences, agreed = ScoreForm.from_card(card).confidences(scores), found == truth
    surest = np.argsort(-confidences, kind="stable")[: max(1, round(COVERED * len(agreed)))]
    by_class = [float(agreed[truth == each].mean()) for each in np.unique(truth) if (truth == each).sum() >= 10]
    bins = reliability_table(confidences, agreed)
    error = sum(count * abs(share - (low + high) / 2) for low, high, count, share in bins) / len(agreed)
    passing = confidences >= card.min_confidence
    return {
        "size": card.notes["size"],
        "cost": card.relative_cost,
        "images": len(agreed),
        "itself": float((classifier.scores(as_tiles_show(pixels, card.tile_side)).argmax(1) == answers).mean()),
        "agrees": float(agreed.mean()),
        "lowest class": min(by_class, default=None),
        "mean over classes": float(np.mean(by_class)) if by_class else None,
        "calibration error": error,
        "agrees, surest 70 %": float(agreed[surest].mean()),
        "passes the card's gate": float(passing.mean()),
        "agrees behind it": float(agreed[passing].mean()) if passing.any() else None,
        "minutes": card.notes["training_seconds"] / 60,
    }


def main() -> None:
    """Fit, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", required=True, metavar="NAME: OPTIONS", help="may be given again")
    parser.add_argument("--minutes", default="20", help="of each training; the default is 20")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--grids", default="3", help="comma-separated; the default is 3")
    parser.add_argument("--cost", default="0.6")
    parser.add_argument("--weights", default="classifier,fresh", help="kinds of weights, comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the fits, and rows.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in arguments.case:
        name, _, text = case.partition(":")
        common = [*shlex.split(text), "--minutes", arguments.minutes, "--threads", arguments.threads]
        common += ["--cost", arguments.cost]
        seen = None
        for grid in arguments.grids.split(","):
            for weights in arguments.weights.split(","):
                folder = arguments.out / f"{name.strip()}-{grid}x{grid}-{weights}"
                options = [*common, "--grid", grid, "--weights", weights]
                fitted(options, folder)
                seen = tested(options, folder) if seen is None else seen
                path = next(iter(folder.glob("*-collage-*.json")))
                row = {"classifier": name.strip(), "grid": grid, "weights": weights, **measured(path, *seen)}
                rows.append(row)
                (arguments.out / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(" | ".join(["", *rows[0], ""]).strip())
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )


if __name__ == "__main__":
    main()
