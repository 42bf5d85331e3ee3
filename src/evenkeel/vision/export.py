"""ONNX files with their cards: accuracy, agreement, calibration and cost, all measured on the file itself.

What a card claims is measured through ONNX Runtime on the exported file, not on the torch network it came from.
"""

import copy
import hashlib
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evenkeel.cards import Measured, ModelCard, save_card
from evenkeel.vision.architecture import Served, count_macs, count_parameters
from evenkeel.vision.data import CLASSES, MEAN, STD, Images, collage

__all__ = [
    "OPSET",
    "Session",
    "export_pair",
    "fit_temperature",
    "fold_norms",
    "interleaved_latencies_ms",
    "shuffled_collages",
    "wilson",
    "write_demonstration_images",
    "write_onnx",
]

OPSET = 17  # read by every ONNX Runtime since 1.12
GRIDS = (2, 3, 4)
_SIDE = 32

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Session:
    """A model file ready to run on one thread."""

    path: Path
    runtime: onnxruntime.InferenceSession

    @classmethod
    def open(cls, path: Path) -> "Session":
        """The model at `path`, loaded."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        return cls(path, onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))

    def __call__(self, images: Pixels, batch: int = 100) -> Scores:
        """Scores of `images` [n, height, width, 3]."""
        parts = [images[place : place + batch] for place in range(0, len(images), batch)]
        return np.concatenate([np.asarray(self.runtime.run(["scores"], {"images": part})[0]) for part in parts])


def wilson(hits: int, count: int, how: str) -> Measured:
    """The share `hits` / `count` with its 95 % Wilson score interval. Source: Wilson, JASA 22 (1927)."""
    z = 1.959964
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return Measured(round(share, 5), round(centre - reach, 5), round(centre + reach, 5), count, how)


def fit_temperature(scores: Scores, labels: NDArray[np.int64]) -> float:
    """The temperature at which softmax(scores / temperature) gives `labels` the highest likelihood.

    `scores` [n, classes] must be of images that trained nothing. Source: Guo et al., ICML 2017, section 4.2.
    """

    def loss(temperature: float) -> float:
        scaled = scores.astype(np.float64) / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled).sum(axis=1))
        return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())

    # The loss has one minimum over the logarithm of the temperature, so a golden-section search finds it.
    low, high = math.log(0.02), math.log(20.0)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(math.exp(left)) < loss(math.exp(right)):
            high = right
        else:
            low = left
    return round(math.exp((low + high) / 2), 4)


def fold_norms(network: nn.Module) -> nn.Module:
    """A copy of `network` for serving: each batch norm folded into the convolution before it, weights rounded.

    A pooling between the two is no obstacle: with a gain above zero the maximum of a scaled map is the scaled maximum.
    Weights are rounded to half precision, though still float32 here: the file then holds them at half the size, and
    computes exactly what this network computes.
    """
    network = copy.deepcopy(network).eval()
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for place, (_, norm) in enumerate(children):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            before = next(at for at in range(place - 1, -1, -1) if isinstance(children[at][1], nn.Conv2d))
            convolution = children[before][1]
            between = [child for _, child in children[before + 1 : place]]
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(parent, nn.Sequential)
            assert not between or (isinstance(between[0], nn.MaxPool2d) and bool((norm.weight > 0).all()))
            parent[before] = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
            parent[place] = nn.Identity()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
    return network.requires_grad_(False)


def write_onnx(network: nn.Module, path: Path, side: int) -> float:
    """The largest difference of a score from torch's, once the folded `network` is written to `path`.

    The file takes uint8 images [n, side, side, 3], any n.
    """
    served = Served(network, MEAN, STD).eval()
    example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # The older exporter writes one file without external data, and plain operators; it announces its successor.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            served,
            (example,),
            str(path),
            input_names=["images"],
            output_names=["scores"],
            dynamic_axes={"images": {0: "n"}, "scores": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    _halve(path)
    with torch.no_grad():
        difference = served(example).numpy() - Session.open(path)(example.numpy())
    return float(np.abs(difference).max())


def _halve(path: Path) -> None:
    """Store the weights of the model at `path` in half precision, each with a cast that is folded when it is loaded."""
    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < 1000:
            continue
        halved = values.astype(np.float16)
        if not np.array_equal(halved.astype(np.float32), values):
            continue  # not rounded before, so halving would change what the model computes
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(halved, name + ".half"))
        casts.append(helper.make_node("Cast", [name + ".half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def interleaved_latencies_ms(runs: list[Callable[[], object]], rounds: int = 300) -> list[float]:
    """Median milliseconds of each of `runs`, called in turn, so that a disturbance strikes all of them alike."""
    times = np.empty((rounds, len(runs)))
    for run in runs:
        run()
    for turn in range(rounds):
        for place, run in enumerate(runs):
            began = time.perf_counter()
            run()
            times[turn, place] = time.perf_counter() - began
    return [float(value) for value in np.median(times, axis=0) * 1e3]


def shuffled_collages(count: int, grid: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` images each cell holds [n, grid * grid]: one random permutation, classes mixed."""
    order = np.random.default_rng(seed).permutation(count)
    cells = grid * grid
    return order[: count // cells * cells].reshape(-1, cells)


def _canvases(pixels: Tensor, cells: NDArray[np.int64], grid: int, blank: NDArray[np.bool_] | None = None) -> Pixels:
    hidden = None if blank is None else torch.from_numpy(blank)
    drawn = collage(pixels[torch.from_numpy(cells.reshape(-1))], grid, hidden)
    return drawn.permute(0, 2, 3, 1).contiguous().numpy()


def _nhwc(images: Images) -> Pixels:
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy()


def export_pair(
    classifier: nn.Module,
    collage_net: nn.Module,
    notes: tuple[dict[str, Any], dict[str, Any]],
    held: Images,
    test: Images,
    folder: Path,
    data_name: str = "CIFAR-10",
    report: Callable[[str], None] = print,
    rounds: int = 300,
) -> list[ModelCard]:
    """Writes the classifier and one file per grid of the Collage-CNN into `folder`, each with its card.

    Temperatures come from `held` training images; accuracies are on `test`, which nothing else has touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["cifar10-base", *(f"cifar10-collage-{grid}x{grid}" for grid in GRIDS)]
    networks = [fold_norms(classifier), *([fold_norms(collage_net)] * len(GRIDS))]
    sides = [_SIDE, *(grid * _SIDE for grid in GRIDS)]
    sessions, differences = [], []
    for name, network, side in zip(names, networks, sides, strict=True):
        path = folder / f"{name}.onnx"
        differences.append(write_onnx(network, path, side))
        sessions.append(Session.open(path))
    base, collages = sessions[0], sessions[1:]

    answers = base(_nhwc(test)).argmax(axis=1)
    labels, held_labels = test.labels.numpy(), held.labels.numpy()
    common = {"data": data_name, "opset": OPSET, "held_out_images": len(held)}
    cards = [
        ModelCard(
            name=names[0],
            kind="classifier",
            file=base.path.name,
            sha256=_sha256(base.path),
            classes=CLASSES,
            height=_SIDE,
            width=_SIDE,
            mean=MEAN,
            std=STD,
            temperature=fit_temperature(base(_nhwc(held)), held_labels),
            macs=count_macs(classifier, (3, _SIDE, _SIDE)),
            parameters=count_parameters(classifier),
            accuracy=wilson(int((answers == labels).sum()), len(labels), f"all {len(labels):,} test images, one view"),
            notes=common | notes[0],
        )
    ]
    report(f"{names[0]}: accuracy {cards[0].accuracy}")
    for name, session, grid in zip(names[1:], collages, GRIDS, strict=True):
        temperature = _collage_temperature(session, held, grid)
        cells = shuffled_collages(len(labels), grid, seed=grid)
        found = session(_canvases(test.pixels, cells, grid)).argmax(axis=2)
        how = f"{len(cells):,} full {grid}x{grid} collages of distinct test images, shuffled, classes mixed"
        extra: dict[str, Any] = common | notes[1]
        if grid == 3:
            extra |= {"accuracy_by_items_in_group": _partly_filled(session, test, grid)}
        cards.append(
            ModelCard(
                name=name,
                kind="collage",
                file=session.path.name,
                sha256=_sha256(session.path),
                classes=CLASSES,
                height=grid * _SIDE,
                width=grid * _SIDE,
                mean=MEAN,
                std=STD,
                grid=grid,
                tile_side=_SIDE,
                temperature=temperature,
                macs=count_macs(collage_net, (3, grid * _SIDE, grid * _SIDE)),
                parameters=count_parameters(collage_net),
                accuracy=wilson(int((found == labels[cells]).sum()), cells.size, how),
                agreement=wilson(int((found == answers[cells]).sum()), cells.size, how),
                notes=extra,
            )
        )
        report(f"{name}: accuracy {cards[-1].accuracy}")
    return _with_costs(cards, sessions, differences, folder, report, rounds)


def write_demonstration_images(test: Images, path: Path, count: int = 400, seed: int = 0) -> None:
    """`count` of the `test` images, drawn at random over all classes, as `images` and `labels` in one npz file."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(test))[:count])
    np.savez_compressed(path, images=_nhwc(test)[order], labels=test.labels[order].numpy())


def _collage_temperature(session: Session, held: Images, grid: int) -> float:
    cells = shuffled_collages(len(held), grid, seed=100 + grid)
    scores = session(_canvases(held.pixels, cells, grid))
    return fit_temperature(scores.reshape(-1, scores.shape[2]), held.labels.numpy()[cells].reshape(-1))


def _partly_filled(session: Session, test: Images, grid: int) -> dict[str, list[float]]:
    """For 1..N items at random places of a grid, other cells blank: accuracy, low, high and sample size."""
    labels = test.labels.numpy()
    cells = shuffled_collages(len(labels), grid, seed=grid)
    table = {}
    for count in range(1, grid * grid + 1):
        places = np.random.default_rng(count).random(cells.shape).argsort(axis=1)
        blank = places >= count
        found = session(_canvases(test.pixels, cells, grid, blank)).argmax(axis=2)
        share = wilson(int((found == labels[cells])[~blank].sum()), int((~blank).sum()), "")
        table[str(count)] = [share.value, share.low, share.high, share.sample_size]
    return table


def _with_costs(
    cards: list[ModelCard],
    sessions: list[Session],
    differences: list[float],
    folder: Path,
    report: Callable[[str], None],
    rounds: int,
) -> list[ModelCard]:
    random = np.random.default_rng(0)
    runs: list[Callable[[], object]] = []
    for card, session in zip(cards, sessions, strict=True):
        image = random.integers(0, 256, (1, *card.input_shape), dtype=np.uint8)
        runs.append(lambda session=session, image=image: session(image))  # type: ignore[misc]
    medians = interleaved_latencies_ms(runs, rounds)
    done = []
    for card, median, difference in zip(cards, medians, differences, strict=True):
        measured = {
            "latency_how": f"median of {rounds} interleaved passes, batch 1, one thread, ONNX Runtime CPU",
            "onnxruntime": onnxruntime.__version__,
            "machine": _machine(),
            "largest_difference_from_torch": float(f"{difference:.1e}"),
        }
        card = replace(
            card,
            latency_ms=round(median, 3),
            relative_cost=round(median / medians[0], 3),
            notes=card.notes | measured,
        )
        save_card(card, folder / f"{card.name}.json")
        report(f"{card.name}: {median:.2f} ms, relative cost {card.relative_cost}, difference {difference:.1e}")
        done.append(card)
    return done


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} CPUs"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
