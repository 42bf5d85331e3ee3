"""The fast convolution agrees with its plain twin, forwards and backwards."""

import pytest

torch = pytest.importorskip("torch", reason="training needs evenkeel[train]")

from evenkeel.vision.winograd import WinogradConv2d, winograd_conv2d  # noqa: E402


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


def test_the_layer_is_plain_outside_training() -> None:
    torch.manual_seed(0)
    layer = WinogradConv2d(4, 6)
    images = torch.randn(2, 4, 8, 8)
    plain = torch.nn.functional.conv2d(images, layer.weight, padding=1)
    assert torch.equal(layer.eval()(images), plain)
    assert (layer.train()(images) - plain).abs().max() < 1e-4
