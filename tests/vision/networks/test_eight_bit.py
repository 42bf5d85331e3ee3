"""Convolutions in 8 bits: the float network is the twin."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from evenkeel.models.measure import ModelSession
from evenkeel.vision.networks.architecture import CollageNet, TileNet
from evenkeel.vision.networks.export import fold_norms, write_onnx, write_served
from fit_helpers import trained_a_little


def smooth_images(count: int, side: int, seed: int) -> np.ndarray:
    """Coloured blocks of eight pixels, uint8 [count, side, side, 3]: unlike noise, their scores differ."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One network twice: in floating point and in 8 bits."""
    folder = tmp_path_factory.mktemp("bits")
    torch.manual_seed(2)
    network = CollageNet(fold_norms(trained_a_little(TileNet(10, (8, 16, 24)))), 2, 32)
    write_onnx(network, folder / "float.onnx", 64)
    write_onnx(network, folder / "int.onnx", 64, seen=smooth_images(30, 64, 0))
    return folder / "float.onnx", folder / "int.onnx"


def test_scores_are_those_of_the_float_network_up_to_rounding(files: tuple[Path, Path]) -> None:
    images = smooth_images(200, 64, 1)
    exact, rounded = (ModelSession.open(path)(images).reshape(-1, 10) for path in files)
    assert np.abs(rounded - exact).std() < 0.05 * exact.std()
    assert (rounded.argmax(1) == exact.argmax(1)).mean() > 0.95


def test_a_tile_is_read_alike_whatever_stands_beside_it(files: tuple[Path, Path]) -> None:
    images = smooth_images(20, 64, 2)
    others = smooth_images(20, 64, 3)
    others[:, :32, :32] = images[:, :32, :32]
    session = ModelSession.open(files[1])
    assert np.array_equal(session(images)[:, 0], session(others, batch=1)[:, 0])


def test_weights_are_small_enough_for_sums_in_sixteen_bits(files: tuple[Path, Path]) -> None:
    graph = onnx.load(str(files[1])).graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    kernels = [each for each in weights if each.dtype == np.int8 and each.ndim == 4]
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    assert len(kernels) == convolutions - 1  # all but the first, which reads the pixels
    assert max(np.abs(each.astype(int)).max() for each in kernels) <= 64


def test_the_head_has_eight_bits_too(files: tuple[Path, Path]) -> None:
    graph = onnx.load(str(files[1])).graph
    heads = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    made_by = {node.output[0]: node.op_type for node in graph.node}
    assert heads
    assert all(made_by.get(name) == "DequantizeLinear" for node in heads for name in node.input[:2])


class _PaddedByHand(nn.Module):
    """Two convolutions, the second over a map that is padded on one side by itself, as TensorFlow's exporters do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        between = torch.relu(self.norm(self.first(images.permute(0, 3, 1, 2).float() / 255)))
        scores: Tensor = self.second(nn.functional.pad(between, (0, 1, 0, 1), value=0.0)).mean((2, 3))
        return scores


def test_nothing_is_computed_in_floats_between_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = _PaddedByHand()
    nn.init.uniform_(network.first.weight, 0.0, 0.4)
    images = smooth_images(40, 32, 4)
    write_served(network, torch.from_numpy(images[:2]), tmp_path / "float.onnx")
    write_served(network, torch.from_numpy(images[:2]), tmp_path / "int.onnx", seen=images)
    graph = onnx.load(str(tmp_path / "int.onnx")).graph
    assert not {"Pad", "BatchNormalization"} & {node.op_type for node in graph.node}
    exact, rounded = (ModelSession.open(tmp_path / name)(images) for name in ("float.onnx", "int.onnx"))
    assert np.abs(rounded - exact).std() < 0.05 * exact.std()
    onnx.checker.check_model(onnx.load(str(tmp_path / "int.onnx")), full_check=True)


class _Attending(nn.Module):
    """Patches that look at each other, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.joined, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.patches(images.permute(0, 3, 1, 2).float() / 255).flatten(2).transpose(1, 2)
        asked, told, value = self.joined(rows).chunk(3, -1)
        scores: Tensor = self.head((asked @ told.transpose(1, 2)).softmax(-1) @ value).mean(1)
        return scores


def test_products_of_attention_stay_in_floats(tmp_path: Path) -> None:
    torch.manual_seed(4)
    images = smooth_images(20, 32, 5)
    write_served(_Attending(), torch.from_numpy(images[:2]), tmp_path / "int.onnx", seen=images)
    graph = onnx.load(str(tmp_path / "int.onnx")).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    products = [[made_by.get(name) for name in node.input] for node in graph.node if node.op_type == "MatMul"]
    assert sorted(kinds.count("DequantizeLinear") for kinds in products) == [0, 0, 2, 2]
