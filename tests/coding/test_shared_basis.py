"""Bases: how many directions, judged by what they were not learnt from."""

import pytest

torch = pytest.importorskip("torch", reason="sum codes need evenkeel[train]")

from torch import Tensor  # noqa: E402

from evenkeel.coding.shared_basis import Moments, learn  # noqa: E402
from evenkeel.errors import CodeError  # noqa: E402


def moments_of(learnt: Tensor, held_out: Tensor) -> Moments:
    moments = Moments.none(learnt.shape[1], learnt.device)
    for part in learnt.split(7):
        moments.add(part, hold_out=False)
    moments.add(held_out, hold_out=True)
    return moments


def low_rank(count: int, size: int, rank: int, noise: float, seed: int) -> Tensor:
    directions = torch.randn(rank, size, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    noisy = noise * torch.randn(count, size, generator=generator)
    return torch.randn(count, rank, generator=generator) @ directions + noisy


def test_as_many_directions_as_the_vectors_have() -> None:
    basis, lost = learn(moments_of(low_rank(100, 32, 3, 0.01, 0), low_rank(50, 32, 3, 0.01, 1)), 0.01, most=16)
    assert basis.shape == (32, 3)
    assert 0 < lost < 0.01
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    vectors = low_rank(10, 32, 3, 0, 2)
    torch.testing.assert_close(vectors @ basis @ basis.T, vectors, atol=0.1, rtol=0.1)


def test_few_samples_of_noise_do_not_pass_for_structure() -> None:
    noise = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    basis, lost = learn(moments_of(noise[0], noise[1]), 0.01, most=20)
    assert basis.shape[1] == 20  # 10 would keep all energy of the samples themselves
    assert lost > 0.5


def test_the_loss_is_that_of_the_held_out_vectors() -> None:
    held_out = low_rank(40, 32, 6, 0.1, 5)
    basis, lost = learn(moments_of(low_rank(200, 32, 6, 0.1, 4), held_out), 0.001, most=4)
    outside = held_out - held_out @ basis @ basis.T
    assert lost == pytest.approx(float(outside.square().sum() / held_out.square().sum()), rel=1e-3)


def test_nothing_held_out_tells_nothing() -> None:
    assert learn(moments_of(torch.randn(5, 8), torch.zeros(1, 8)), 0.01, most=2)[1] == 1
    with pytest.raises(CodeError, match="1 to 8 directions, found 9"):
        learn(Moments.none(8, torch.device("cpu")), 0.01, most=9)
