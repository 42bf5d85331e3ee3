"""Convolutions of single channels: PyTorch's own results, whichever way the gradients are computed."""

import pytest
import torch

from evenkeel.vision.networks.depthwise import depthwise


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride", "padding", "dilation"),
    [
        (2, 2, (5, 5), 1, 2, 1),
        (2, 2, (3, 3), 1, 1, 1),
        (4, 3, (5, 5), 2, 2, 1),
        (4, 4, (5, 3), 1, 4, 2),
        (7, 7, (5, 5), 1, 2, 1),
        (6, 5, (3, 3), 1, 0, 2),
        (20, 9, (5, 5), 2, 2, 1),
    ],
)
def test_gradients_are_those_of_a_plain_convolution(
    height: int, width: int, kernel: tuple[int, int], stride: int, padding: int, dilation: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 6, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, *kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    added = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True) if bias else None
    form = [stride] * 2, [padding] * 2, [dilation] * 2
    wanted = torch.nn.functional.conv2d(images, weight, added, *form, 6)
    found = depthwise(images, weight, added, *form)
    assert torch.equal(found, wanted)
    above = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    sources = [each for each in (images, weight, added) if each is not None]
    for mine, theirs in zip(
        torch.autograd.grad(found, sources, above), torch.autograd.grad(wanted, sources, above), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_weights_that_are_not_learned_get_no_gradient() -> None:
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3)
    depthwise(images, weight, None, [1, 1], [1, 1], [1, 1]).sum().backward()
    assert images.grad is not None
    assert weight.grad is None
