"""Bases: how many directions, judged by what they were not learnt from."""

import pytest
import torch
from torch import Tensor

from evenkeel.coding.sums.shared_basis import Moments, learn
from evenkeel.errors import CodeError


def moments_of(learnt: Tensor, held_out: Tensor) -> Moments:
    """Of one layer."""
    moments = Moments.none(1, learnt.shape[1], learnt.device)
    for part in learnt[None].split(7, dim=1):
        moments.add(part, hold_out=False)
    moments.add(held_out[None], hold_out=True)
    return moments


def learn_one(moments: Moments, loss: float, limit: int) -> tuple[Tensor, float]:
    bases, lost = learn(moments, loss, limit)
    return bases[0], float(lost[0])


def low_rank(count: int, size: int, rank: int, noise: float, seed: int) -> Tensor:
    directions = torch.randn(rank, size, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    noisy = noise * torch.randn(count, size, generator=generator)
    return torch.randn(count, rank, generator=generator) @ directions + noisy


def test_as_many_directions_as_the_vectors_have() -> None:
    basis, lost = learn_one(moments_of(low_rank(100, 32, 3, 0.01, 0), low_rank(50, 32, 3, 0.01, 1)), 0.01, limit=16)
    assert basis.shape == (32, 3)
    assert 0 < lost < 0.01
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    vectors = low_rank(10, 32, 3, 0, 2)
    torch.testing.assert_close(vectors @ basis @ basis.T, vectors, atol=0.1, rtol=0.1)


def test_few_samples_of_noise_do_not_pass_for_structure() -> None:
    noise = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(3))
    basis, lost = learn_one(moments_of(noise[0], noise[1]), 0.01, limit=20)
    assert basis.shape[1] == 20  # 10 would keep all energy of the samples themselves
    assert lost > 0.5


def test_the_loss_is_that_of_the_held_out_vectors() -> None:
    held_out = low_rank(40, 32, 6, 0.1, 5)
    basis, lost = learn_one(moments_of(low_rank(200, 32, 6, 0.1, 4), held_out), 0.001, limit=4)
    outside = held_out - held_out @ basis @ basis.T
    assert lost == pytest.approx(float(outside.square().sum() / held_out.square().sum()), rel=1e-3)


def test_nothing_held_out_tells_nothing() -> None:
    assert learn_one(moments_of(torch.randn(5, 8), torch.zeros(1, 8)), 0.01, limit=2)[1] == 1
    with pytest.raises(CodeError, match="1 to 8 directions, found 9"):
        learn(Moments.none(1, 8, torch.device("cpu")), 0.01, limit=9)


def test_layers_have_their_own_directions_as_many_as_one_of_them_needs() -> None:
    learnt = torch.stack([low_rank(100, 32, 2, 0.01, 6), low_rank(100, 32, 5, 0.01, 7), torch.zeros(100, 32)])
    moments = Moments.none(3, 32, torch.device("cpu"))
    moments.add(learnt, hold_out=False)
    moments.add(learnt[:, :30], hold_out=True)
    bases, lost = learn(moments, 0.01, limit=16)
    assert bases.shape == (3, 32, 5)
    assert bool((lost[:2] < 0.01).all())
    assert float(lost[2]) == 1
    for layer, alone in enumerate(learnt[:2]):
        basis, _ = learn_one(moments_of(alone, alone[:30]), 0.01, limit=16)
        together = bases[layer] @ bases[layer].mT @ basis
        torch.testing.assert_close(together, basis, atol=1e-3, rtol=0)
