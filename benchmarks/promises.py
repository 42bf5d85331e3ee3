"""Are promises of accuracy kept, and what do they cost?

Draws many calibrations from a population whose accuracy at every threshold is known, certifies each, and counts how
often the certified threshold breaks its promise there, and the naive one; how much it sends to the accurate model
beyond an oracle; and how many labels, or answers of the accurate model, it had to look at. Populations: a synthetic
pair of models (also with loss of packets), and with --images the 10,000 test images of CIFAR-10, resampled, on which
the shipped classifier is the accurate model and the 2x2 Collage-CNN the light one. Last, what one decision takes in the
gateway.

    python benchmarks/promises.py
    python benchmarks/promises.py --images cifar10.parquet --answers answers.npz
"""

import argparse
import timeit
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evenkeel.coding.answers import Cascade, ScoreForm
from evenkeel.coding.answers.by_name import CollageSettings, OwnModel
from evenkeel.coding.answers.collage import Collage
from evenkeel.edge.both_models import answers_of_accurate, answers_of_collage
from evenkeel.edge.certifying import examined
from evenkeel.figures.estimates import exact_share
from evenkeel.images.image_set import read_images
from evenkeel.models.cards import load_card
from evenkeel.models.shipped import card_path
from evenkeel.promises.certificate import Certificate
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Curve, Pairs, Threshold, certify, naive, sequence
from evenkeel.serving.gateway.promise_gate import PromiseGate

_POPULATION = 2_000_000
_TUNING = 0.25  # pairs to tune with, for each one to calibrate with


def synthetic(loss: float, seed: int) -> Pairs:
    """Makes a population: light model right in .746, accurate one in .823; less the more packets were lost."""
    random = np.random.default_rng(seed)
    scores = random.beta(2.2, 0.75, _POPULATION)
    light = random.random(_POPULATION) < scores * (1 - 0.6 * loss)
    accurate = random.random(_POPULATION) < 0.45 + 0.5 * scores
    both_wrong_alike = random.random(_POPULATION) < 0.3
    return Pairs(scores, np.where(light | accurate, light & accurate, both_wrong_alike), light, accurate)


def recorded(images: Path, answers: Path) -> Pairs:
    """Has the shipped models answer the images, once; later runs read the answers."""
    if not answers.exists():
        base, light = (load_card(card_path(name)) for name in ("cifar10-base", "cifar10-collage-2x2"))
        given = read_images(images, height=base.height, width=base.width, split="test")
        assert given.labels is not None
        code = CollageSettings().code(OwnModel(base.name, ScoreForm.from_card(base), base.layout), light)
        assert isinstance(code, Collage)
        accurate = answers_of_accurate(card_path(base.name), given.pixels, 1, lambda done: None)
        folder = card_path(base.name).parent
        sure, classes = answers_of_collage(code, light, folder, given.pixels, True, 0, 1, lambda done: None)
        np.savez(answers, sure=sure[:, 0], light=classes, accurate=accurate, labels=given.labels)
    with np.load(answers) as file:
        light, accurate, labels = file["light"], file["accurate"], file["labels"]
        return Pairs(file["sure"], light == accurate, light == labels, accurate == labels)


def measure(name: str, whole: Pairs, promises: Sequence[Promise], n: int, repetitions: int) -> None:
    """Prints a line for each promise: misses, certified share, offload beyond the oracle's, what was looked at."""
    grid = np.append(np.unique(np.quantile(whole.scores, np.linspace(0, 1, 5001))), NEVER)
    truth = Curve.of(whole, grid)
    offload = 1 - truth.local / truth.n
    for promise in promises:
        risk = truth.risk(promise)
        allowed = promise.level if promise.kind == "max_accuracy_drop" else 1 - promise.level
        oracle = float(offload[risk <= allowed].min())
        random = np.random.default_rng(0)
        missed = naively = certified = cost_missed = 0
        offloads, looks = [], []
        for _ in range(repetitions):
            places = random.integers(0, len(whole), n + round(_TUNING * n))
            tuning, calibration = whole.take(places[n:]), whole.take(places[:n])
            order = sequence(tuning, promise)
            found = certify(calibration, order, promise, tuning=tuning)
            at = naive(calibration, grid[:: len(grid) // 1000], promise)
            naively += (
                Curve.of(whole, np.array([at])).risk(promise)[0] > allowed
                if len(whole) < 20_000
                else (np.interp(at, grid, risk) > allowed)
            )
            if found.threshold is not None:
                exactly = Curve.of(whole, np.array([found.threshold])) if len(whole) < 20_000 else None
                certified += 1
                true_risk = np.interp(found.threshold, grid, risk) if exactly is None else exactly.risk(promise)[0]
                true_offload = (
                    np.interp(found.threshold, grid, offload) if exactly is None else 1 - exactly.local[0] / exactly.n
                )
                missed += true_risk > allowed
                cost_missed += true_offload > found.offload_high
                offloads.append(true_offload)
                looks.append(examined(calibration, order, found, promise) / n)
        share = exact_share(int(missed), repetitions)
        print(
            f"{name:26} {promise.kind:18} {promise.level:<6g} n={n:<6} missed {share.value:.3f} "
            f"({share.low:.3f}-{share.high:.3f})  naive {naively / repetitions:.3f}  certified "
            f"{certified / repetitions:.3f}  offload {np.mean(offloads):.3f}, oracle {oracle:.3f}, beyond "
            f"{100 * (np.mean(offloads) - oracle):+.1f} points  bound of cost missed {cost_missed / repetitions:.3f}  "
            f"looked at {np.mean(looks):.2f} n",
            flush=True,
        )


def decision_us() -> float:
    """Measures one decision in the gateway: the promise's threshold, and the light model's row read and compared."""
    promise = Promise("min_agreement", 0.95)
    certificate = Certificate(
        "cascade", "light", "full", {"light": "a", "full": "b"}, "margin", 1.5,
        (Threshold(promise, 0, 0.9, 5000, 0.5, 0.5, 0.04, 0.05),), 0.0, 4e9,
    )  # fmt: skip
    gate, code = PromiseGate(certificate, audit_share=0.01), Cascade(8, ScoreForm(10), kind="margin")
    reply = {1: np.random.default_rng(0).normal(0, 3, (1, 10)).astype(np.float32)}

    def decide() -> bool:
        grant = gate.grant(promise)
        gate.chooses_audit()
        return grant is not None and code.decode(1, reply)[0].confidence >= grant.threshold

    return min(timeit.repeat(decide, number=5000, repeat=7)) / 5000 * 1e6


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--n", type=int, default=5000, help="pairs to calibrate with; a quarter more to tune")
    parser.add_argument("--images", type=Path, help="cifar10.parquet")
    parser.add_argument("--answers", type=Path, default=Path("answers.npz"), help="where its answers are kept")
    given = parser.parse_args()
    usual = [Promise("min_accuracy", 0.8), Promise("max_accuracy_drop", 0.01), Promise("min_agreement", 0.95)]
    measure("synthetic", synthetic(0.0, 1), usual, given.n, given.repetitions)
    for loss, level in ((0.1, 0.78), (0.3, 0.76)):
        lossy = synthetic(loss, 2)
        measure(f"synthetic, {loss:.0%} loss", lossy, [Promise("min_accuracy", level)], given.n, given.repetitions)
    if given.images is not None:
        real = [
            Promise("min_accuracy", 0.935), Promise("max_accuracy_drop", 0.005), Promise("min_agreement", 0.97),
            Promise("min_fill_agreement", 0.97),
        ]  # fmt: skip
        measure("CIFAR-10 pair, resampled", recorded(given.images, given.answers), real, given.n, given.repetitions)
    print(f"one decision in the gateway: {decision_us():.1f} us")


if __name__ == "__main__":
    main()
