"""Convolutions in 8 bits: the float network is the twin."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from evenkeel.models.measure import ModelSession
from evenkeel.vision.networks.architecture import CollageNet, TileNet
from evenkeel.vision.networks.export import fold_norms, write_onnx
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
