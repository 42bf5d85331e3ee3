"""Trains the peers that a Collage-CNN is compared with, for one classifier: ParM's parity models, the paper's detector.

python scripts/train_peers.py --data ../shared/data/cifar10.parquet --base base.pt --what parity-sum-2 --out /tmp/peers

Each ends as an ONNX file with its card in --out; what they are worth is measured by `evenkeel bench fills`. A stopped
training goes on from its checkpoint in --out when it is started again. The classifier scores a few views of every image
once, for all trainings with the same --scores; start the second one when that is done. The `scores.npy` that
`evenkeel fit` leaves for the same images will do: then the peers learn from the very views that the Collage-CNN saw.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from evenkeel.errors import EvenkeelError
from evenkeel.images.image_set import read_images
from evenkeel.models.cards import Encoder
from evenkeel.models.measure import ModelSession
from evenkeel.vision.fit.views import ViewBank
from evenkeel.vision.networks.architecture import ClassifierNet, count_macs
from evenkeel.vision.networks.data import CLASSES, LabelledImages, as_images
from evenkeel.vision.networks.export import fold_norms, write_onnx
from evenkeel.vision.peers.detector import widest_detector
from evenkeel.vision.peers.detector_training import DetectorRecipe, train_detector
from evenkeel.vision.peers.export import export_detector, export_parity
from evenkeel.vision.peers.parity_training import ParityRecipe, train_parity

HELD_OUT = 2000  # training images that no peer learns from
HELD_OUT_SEED = 94  # every training holds out the same ones, and so does `evenkeel fit`
SIDE = 32
PARITIES: dict[str, tuple[Encoder, int]] = {
    "parity-sum-2": ("sum", 2),
    "parity-sum-3": ("sum", 3),
    "parity-sum-4": ("sum", 4),
    "parity-concat-2": ("concat", 2),
    "parity-concat-4": ("concat", 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the CIFAR-10 parquet file")
    parser.add_argument("--base", type=Path, required=True, help="the trained classifier, a .pt file")
    parser.add_argument("--what", choices=(*PARITIES, "detector"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall clock at most (default: %(default)g)")
    parser.add_argument("--epochs", type=float, help="at most (default: the recipe's)")
    parser.add_argument("--scores", type=Path, help="file of the classifier's scores (default: scores.npy in --out)")
    parser.add_argument("--views", type=int, default=4, help="of every image (default: %(default)s)")
    parser.add_argument("--stem-stride", type=int, default=1, help="of the classifier (default: %(default)s)")
    parser.add_argument(
        "--from-base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start parity models from the classifier's weights, which ParM does not (default: yes)",
    )
    parser.add_argument("--grid", type=int, default=3, help="of the detector (default: %(default)s)")
    parser.add_argument(
        "--cost", type=float, default=0.6, help="detector's MACs over the classifier's (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - began:7.0f} s  {line}", flush=True)

    base = load_base(arguments.base, arguments.stem_stride)
    read = read_images(arguments.data, height=SIDE, width=SIDE, split="train")
    rest, held_out = read.hold_out(HELD_OUT, HELD_OUT_SEED)
    train, held = as_images(read.take(rest)), as_images(held_out)
    views = scored_views(base, train, arguments, report)
    limits = {"minutes": arguments.minutes, "seed": arguments.seed}
    if arguments.epochs is not None:
        limits["epochs"] = arguments.epochs
    known = {"data": "CIFAR-10", "views_per_image": arguments.views, "held_out_images": HELD_OUT}
    if arguments.what == "detector":
        name = f"cifar10-detector-{arguments.grid}x{arguments.grid}"
        max_macs = arguments.cost * count_macs(base, (3, SIDE, SIDE))
        network = widest_detector(max_macs, len(CLASSES), arguments.grid, SIDE)
        recipe = DetectorRecipe(grid=arguments.grid, **limits)
        checkpoint = arguments.out / f"{name}.checkpoint"
        detector, notes = train_detector(network, views, held, recipe, checkpoint, report)
        card = export_detector(detector, arguments.grid, SIDE, name, CLASSES, known | notes, arguments.out)
    else:
        encoder, group = PARITIES[arguments.what]
        name = f"cifar10-{arguments.what}"
        parity, notes = train_parity(
            base,
            views,
            held,
            ParityRecipe(encoder, group, **limits),
            arguments.from_base,
            arguments.out / f"{name}.checkpoint",
            report,
        )
        card = export_parity(parity, encoder, group, name, CLASSES, SIDE, known | notes, arguments.out)
    report(f"{card.name}: {card.macs:,} multiply-accumulates, {card.parameters:,} parameters")


def load_base(path: Path, stem_stride: int) -> ClassifierNet:
    state = torch.load(path, weights_only=True)["state"]
    first, second, third = (len(state[f"blocks.{block}.0.weight"]) for block in range(3))
    network = ClassifierNet(len(state["head.weight"]), (first, second, third), stem_stride)
    network.load_state_dict(state)
    return network.eval()


def scored_views(
    base: ClassifierNet, train: LabelledImages, arguments: argparse.Namespace, report: Callable[[str], None]
) -> ViewBank:
    scores = arguments.scores or arguments.out / "scores.npy"
    images = train.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    views = ViewBank(images, len(CLASSES), scores, views=arguments.views)
    waiting = views.missing
    if waiting:
        model = arguments.out / "base.onnx"
        write_onnx(fold_norms(base), model, SIDE)
        done = 0
        for count in views.fill(ModelSession.open(model)):
            done += count
            if done % 10_000 < count:
                report(f"scored {done} of {waiting} views")
    return views


if __name__ == "__main__":
    try:
        main()
    except EvenkeelError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
