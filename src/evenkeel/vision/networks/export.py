"""Writes networks as ONNX files, and the card of a classifier: what it claims is measured on the file itself.

What a card claims is measured through ONNX Runtime on the exported file, not on the torch network it came from.
"""

import copy
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evenkeel.arrays import PixelArray
from evenkeel.files import write_whole
from evenkeel.models.cards import ModelCard, save_card
from evenkeel.models.measure import ModelSession, fit_temperature, interleaved_latencies_ms, wilson
from evenkeel.vision.networks.architecture import Served, count_macs, count_parameters
from evenkeel.vision.networks.data import CIFAR10_MEAN, CIFAR10_STD, LabelledImages
from evenkeel.vision.networks.eight_bit import quantise_convolutions

__all__ = [
    "OPSET",
    "example_images",
    "export_classifier",
    "file_sha256",
    "fold_norms",
    "machine_name",
    "write_demonstration_images",
    "write_onnx",
    "write_served",
]

OPSET = 17  # read by every ONNX Runtime since 1.12
_STILL = 1e-7  # variance of a channel that is the same for all images; dividing by it would leave half precision

Network = TypeVar("Network", bound=nn.Module)


def fold_norms(network: Network) -> Network:
    """Copies `network` for serving: each batch norm folded into the convolution before it, weights rounded.

    A pooling between the two is no obstacle: with a gain above zero the maximum of a scaled map is the scaled maximum.
    Weights are rounded to half precision, though still float32 here: the file then holds them at half the size, and
    computes exactly what this network computes. A channel that was the same for all images stays so for all others.
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
            _silence(convolution, norm)
            parent[before] = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
            parent[place] = nn.Identity()
            after = children[place + 1][1] if place + 1 < len(children) else None
            if between and isinstance(after, nn.ReLU):
                # Both orders give the same; only the rectifier right behind it is made one with the convolution.
                parent[place - 1], parent[place + 1] = after, between[0]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
    return network.requires_grad_(False)


@torch.no_grad()
def _silence(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    still = norm.running_var < _STILL
    convolution.weight[still] = 0
    if convolution.bias is not None:
        convolution.bias[still] = 0
    norm.running_mean[still], norm.running_var[still] = 0, 1


def write_onnx(
    network: nn.Module,
    path: Path,
    side: int,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
    seen: PixelArray | None = None,
) -> float:
    """Writes the folded `network` to `path`; gives the largest difference of a score from torch's.

    The file takes uint8 images [n, side, side, 3], any n, and normalises them itself. With some images that it has
    `seen` its convolutions are of 8 bits, scaled by those.
    """
    return write_served(Served(network, mean, std), example_images(side), path, seen)


def example_images(side: int) -> Tensor:
    """Gives two images uint8 [2, side, side, 3] of noise, to export a network with and to compare the file on."""
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write_served(model: nn.Module, example: Tensor, path: Path, seen: PixelArray | None = None) -> float:
    """Writes `model` to `path`; gives the largest difference of an output from torch's, to two digits.

    The file takes inputs like `example`, any number of rows, and gives `scores`. Weights that were rounded to half
    precision are kept as such, at half the size. With `seen` images the convolutions are of 8 bits.
    """
    model.eval()
    with warnings.catch_warnings():
        # The older exporter writes one file without external data, and plain operators; it announces its successor.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=["images"],
            output_names=["scores"],
            dynamic_axes={"images": {0: "n"}, "scores": {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    if seen is not None:
        quantise_convolutions(path, seen)
    _halve(path)
    with torch.no_grad():
        difference = model(example).numpy() - ModelSession.open(path)(example.numpy())
    return float(f"{np.abs(difference).max():.1e}")


def _halve(path: Path) -> None:
    """Stores the weights of the model at `path` in half precision, each with a cast that is folded at loading."""
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
    write_whole(path, model.SerializeToString())


def export_classifier(
    network: nn.Module,
    notes: dict[str, Any],
    name: str,
    data_name: str,
    classes: tuple[str, ...],
    held: LabelledImages,
    test: LabelledImages,
    folder: Path,
    rounds: int = 300,
) -> ModelCard:
    """Writes a trained classifier as `folder`/`name`.onnx with its card.

    Its temperature comes from `held`, training images that it has not seen; its accuracy is on `test`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, side = folder / f"{name}.onnx", test.pixels.shape[2]
    difference = write_onnx(fold_norms(network), path, side)
    session = ModelSession.open(path)
    labels = test.labels.numpy()
    hits = int((session(_nhwc(test)).argmax(axis=1) == labels).sum())
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    measured = {
        "data": data_name,
        "opset": OPSET,
        "held_out_images": len(held),
        "latency_how": f"median of {rounds} passes, batch 1, one thread, processor time, ONNX Runtime CPU",
        "onnxruntime": onnxruntime.__version__,
        "machine": machine_name(),
        "largest_difference_from_torch": difference,
    }
    card = ModelCard(
        name=name,
        kind="classifier",
        file=path.name,
        sha256=file_sha256(path),
        classes=classes,
        height=side,
        width=side,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        temperature=fit_temperature(session(_nhwc(held)), held.labels.numpy()),
        macs=count_macs(network, (3, side, side)),
        parameters=count_parameters(network),
        latency_ms=round(interleaved_latencies_ms([lambda: session(image)], rounds)[0], 3),
        accuracy=wilson(hits, len(labels), f"all {len(labels):,} test images, one view"),
        notes=notes | measured,
    )
    save_card(card, folder / f"{name}.json")
    return card


def write_demonstration_images(test: LabelledImages, path: Path, count: int = 400, seed: int = 0) -> None:
    """Writes `count` of the `test` images, drawn at random over all classes, as `images` and `labels` in an npz."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(test))[:count])
    np.savez_compressed(path, images=_nhwc(test)[order], labels=test.labels[order].numpy())


def _nhwc(images: LabelledImages) -> PixelArray:
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy()


def machine_name() -> str:
    """Gives the processor's name and the number of CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} CPUs"


def file_sha256(path: Path) -> str:
    """Gives the digest of a file, as a card has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
