"""Trains the models that come with the package, and writes them as ONNX files with their cards.

python scripts/train_cifar10.py --data ../shared/data/cifar10.parquet --out /tmp/models --what all
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from evenkeel.vision.architecture import Classifier, CollageNet
from evenkeel.vision.data import hold_out, load_cifar10
from evenkeel.vision.export import export_pair, write_demonstration_images
from evenkeel.vision.train import ClassifierRecipe, CollageRecipe, train_classifier, train_collage

HELD_OUT = 2000  # training images kept for calibration
HELD_OUT_SEED = 94  # every training holds out the same ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the CIFAR-10 parquet file")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
    parser.add_argument("--what", choices=("base", "collage", "all", "export"), default="all")
    parser.add_argument("--minutes", type=float, help="wall clock for each training (default: the recipe's)")
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
        trained = train_collage(
            train, held, replace(CollageRecipe(), **wanted), arguments.out / "collage.checkpoint", report
        )
        torch.save({"state": trained.network.state_dict(), "notes": trained.notes}, arguments.out / "collage.pt")
    if (arguments.out / "base.pt").is_file() and (arguments.out / "collage.pt").is_file():
        base = torch.load(arguments.out / "base.pt", weights_only=True)
        collage = torch.load(arguments.out / "collage.pt", weights_only=True)
        classifier, network = Classifier(), CollageNet()
        classifier.load_state_dict(base["state"])
        network.load_state_dict(collage["state"])
        test = load_cifar10(arguments.data, "test")
        models = arguments.out / "models"
        export_pair(classifier, network, (base["notes"], collage["notes"]), held, test, models, report=report)
        write_demonstration_images(test, models / "cifar10_test_400.npz")


if __name__ == "__main__":
    main()
