"""The fast convolution agrees with its plain twin, forwards and backwards."""

import pytest
import torch

from evenkeel.vision.networks.winograd import WinogradConv2d, winograd_conv2d


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 4), (1, 5, 15, 15), (3, 8, 7, 7), (2, 4, 3, 3), (1, 2, 1, 9), (2, 6, 24, 10)]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_the_plain_convolution(shape: tuple[int, int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(7, shape[1], 3, 3, generator=generator, requires_grad=True)
    found, plain = winograd_conv2d(images, weight), torch.nn.functional.conv2d(images, weight, padding=1)
    assert found.shape == plain.shape
    pull = torch.randn(plain.shape, generator=generator)
    pairs = [(found, plain)]
    pairs += list(zip(*(torch.autograd.grad(y, (images, weight), pull) for y in (found, plain)), strict=True))
    for fast, slow in pairs:
        assert (fast - slow).abs().max() < 1e-4 * slow.abs().max()


@pytest.mark.parametrize("faster", [True, False])
def test_the_layer_is_plain_outside_training_and_where_that_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenkeel.vision.networks.winograd.winograd_is_fast", lambda: faster)
    torch.manual_seed(0)
    layer = WinogradConv2d(4, 6)
    images = torch.randn(2, 4, 8, 8)
    plain = torch.nn.functional.conv2d(images, layer.weight, padding=1)
    assert torch.equal(layer.eval()(images), plain)
    trained = layer.train()(images)
    assert (trained - plain).abs().max() < 1e-4
    assert ("_Winograd" in type(trained.grad_fn).__name__) == faster
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
