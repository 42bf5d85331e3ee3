"""Muon: an orthogonal step, a fixed norm, and that it goes downhill."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from evenkeel.vision.networks.muon import Muon, orthogonal


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    count = min(rows, columns)
    values = torch.rand(count, generator=generator) * 0.5 + 0.5
    matrix = left[:, :count] * values @ right[:count]
    found = orthogonal(matrix, steps=5)
    cores = left[:, :count].T @ found @ right[:count].T  # diagonal, if the vectors are kept
    assert torch.allclose(cores, torch.diag(cores.diagonal()), atol=1e-3)
    assert (cores.diagonal() > 0.5).all()
    assert (cores.diagonal() < 1.4).all()


def test_the_scale_of_the_gradient_says_nothing() -> None:
    gradient = torch.randn(8, 27)
    assert torch.allclose(orthogonal(gradient), orthogonal(1e4 * gradient), atol=1e-3)
    assert torch.isfinite(orthogonal(torch.zeros(8, 27))).all()


def test_a_step_holds_the_norm_and_goes_downhill() -> None:
    torch.manual_seed(0)
    filters = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    wanted = torch.nn.functional.normalize(torch.randn(8, 36), dim=None) * 8**0.5
    optimiser = Muon([filters], lr=0.1)
    losses = []
    for step in range(60):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
        unit = filters.flatten(1) / filters.norm() * 8**0.5
        loss = (unit - wanted).square().sum()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.05 * losses[0]
    assert filters.norm().item() == pytest.approx(8**0.5, rel=0.05)


def test_its_state_is_saved_and_restored() -> None:
    def run(steps: int, state: "dict[str, object] | None", filters: "torch.nn.Parameter") -> "dict[str, object]":
        optimiser = Muon([filters], lr=0.1)
        if state is not None:
            optimiser.load_state_dict(state)
        for _ in range(steps):
            optimiser.zero_grad()
            (filters - 1).square().sum().backward()
            optimiser.step()
        return optimiser.state_dict()

    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    parts = torch.nn.Parameter(whole.detach().clone())
    run(4, None, whole)
    run(2, run(2, None, parts), parts)
    assert torch.equal(whole, parts)
