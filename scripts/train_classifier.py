"""Trains a classifier to be backed up, such as the one that comes with the package: ONNX file and card.

    python scripts/train_classifier.py --data cifar10.parquet --test-split test --name cifar10-base --out models/
    evenkeel fit --classifier models/cifar10-base.json --images cifar10.parquet --split train --out models/fit-3x3

The second line then makes a Collage-CNN for it, as for any classifier. A stopped training goes on from its checkpoint
in --out when it is started again. On Linux these two settings make it about a fifth faster, as freed memory is kept
instead of being returned and fetched again at each step:

    export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=17179869184
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from evenkeel.images.image_set import read_images
from evenkeel.vision.networks.data import as_images
from evenkeel.vision.networks.export import export_classifier, write_demonstration_images
from evenkeel.vision.networks.train_classifier import ClassifierRecipe, train_classifier

HELD_OUT = 2000  # training images kept for calibration
HELD_OUT_SEED = 94  # every training holds out the same ones


def main() -> None:
    """Train, then export."""
    recipe = ClassifierRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with a column `split`")
    parser.add_argument("--train-split", default="train", help="default: %(default)s")
    parser.add_argument("--test-split", default="test", help="default: %(default)s")
    parser.add_argument("--side", type=int, default=32, help="of the images, pixels: 32 or 64 (default: %(default)s)")
    parser.add_argument("--name", default="classifier", help="of the model (default: %(default)s)")
    parser.add_argument("--data-name", help="of the data, for the card (default: the file's)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the model")
    parser.add_argument("--epochs", type=float, default=recipe.epochs, help="default: %(default)s")
    parser.add_argument("--widths", type=int, nargs=3, default=recipe.widths, help="channels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--demonstration", type=Path, help="also write 400 test images there (.npz)")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    read = read_images(arguments.data, height=arguments.side, width=arguments.side, split=arguments.train_split)
    rest, held_out = read.hold_out(HELD_OUT, HELD_OUT_SEED)
    train, held = as_images(read.take(rest)), as_images(held_out)
    recipe = replace(
        recipe,
        epochs=arguments.epochs,
        seed=arguments.seed,
        workers=arguments.threads,
        widths=tuple(arguments.widths),
        stem_stride=arguments.side // 32,
        reach=arguments.side // 10,
    )
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {line}", flush=True)

    network, notes = train_classifier(train, held, recipe, arguments.out / f"{arguments.name}.checkpoint", report)
    torch.save({"state": network.state_dict(), "notes": notes}, arguments.out / f"{arguments.name}.pt")
    test = as_images(
        read_images(arguments.data, height=arguments.side, width=arguments.side, split=arguments.test_split)
    )
    names = read.class_names or tuple(str(number) for number in range(int(train.labels.max()) + 1))
    data_name = arguments.data_name or arguments.data.name
    card = export_classifier(network, notes, arguments.name, data_name, names, held, test, arguments.out)
    if arguments.demonstration is not None:
        write_demonstration_images(test, arguments.demonstration)
    report(f"{card.name}: {card.accuracy}, {card.latency_ms} ms")


if __name__ == "__main__":
    main()
