"""Trains the models that come with the package, and writes them as ONNX files with their cards.

python scripts/train_cifar10.py --data ../shared/data/cifar10.parquet --out /tmp/models --what all

A stopped training goes on from its checkpoint in --out when it is started again. On Linux these two settings make it
about a fifth faster, as freed memory is kept instead of being returned and fetched again at each step:

    export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=17179869184
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.vision.architecture import Classifier, CollageNet
from evenkeel.vision.data import hold_out, load_cifar10
from evenkeel.vision.export import export_pair, write_demonstration_images
from evenkeel.vision.train import ClassifierRecipe, CollageRecipe, classifier_scores, train_classifier, train_collage

HELD_OUT = 2000  # training images kept for calibration
HELD_OUT_SEED = 94  # every training holds out the same ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the CIFAR-10 parquet file")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
    parser.add_argument("--what", choices=("base", "collage", "all", "export"), default="all")
    parser.add_argument("--minutes", type=float, help="wall clock for each training (default: the recipe's)")
    parser.add_argument(
        "--distil", action="store_true", help="teach the Collage-CNN the trained classifier's scores too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held = hold_out(load_cifar10(arguments.data, "train"), HELD_OUT, HELD_OUT_SEED)
    wanted = {"seed": arguments.seed}
    if arguments.minutes is not None:
        wanted["minutes"] = arguments.minutes

    began = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {line}", flush=True)

    if arguments.what in ("base", "all"):
        trained = train_classifier(
            train, held, replace(ClassifierRecipe(), **wanted), arguments.out / "base.checkpoint", report
        )
        torch.save({"state": trained.network.state_dict(), "notes": trained.notes}, arguments.out / "base.pt")
    if arguments.what in ("collage", "all"):
        taught = (
            classifier_scores(load(arguments.out / "base.pt", Classifier())[0], train) if arguments.distil else None
        )
        trained = train_collage(
            train, held, replace(CollageRecipe(), **wanted), arguments.out / "collage.checkpoint", report, taught
        )
        torch.save({"state": trained.network.state_dict(), "notes": trained.notes}, arguments.out / "collage.pt")
    if (arguments.out / "base.pt").is_file() and (arguments.out / "collage.pt").is_file():
        classifier, classifier_notes = load(arguments.out / "base.pt", Classifier())
        network, network_notes = load(arguments.out / "collage.pt", CollageNet())
        test = load_cifar10(arguments.data, "test")
        models = arguments.out / "models"
        export_pair(classifier, network, (classifier_notes, network_notes), held, test, models, report=report)
        write_demonstration_images(test, models / "cifar10_test_400.npz")


def load(path: Path, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    stored = torch.load(path, weights_only=True)
    network.load_state_dict(stored["state"])
    return network.eval(), stored["notes"]


if __name__ == "__main__":
    main()
