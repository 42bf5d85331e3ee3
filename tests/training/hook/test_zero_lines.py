"""Rows and columns without a gradient on any rank keep none."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evenkeel
from evenkeel.coding.sum_code import SumCode
from evenkeel.reducers.fake import FakeReducer
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.training.hook.zero_lines import ZeroLines, zero_on_all
from training_helpers import Model, in_threads, nmse

CODES: dict[str, Callable[[], SumCode]] = {
    "thc": lambda: evenkeel.THC(bits=4, block=64),
    "thc2": lambda: evenkeel.THC(bits=2),
    "fixed_point": lambda: evenkeel.FixedPoint(bits=8),
    "low_rank": lambda: evenkeel.LowRank(2),
    "low_rank_thc": lambda: evenkeel.LowRank(4, evenkeel.THC(bits=4, block=64)),
    "gradiveq": lambda: evenkeel.GradiVeQ(sample_steps=4),
    "gradiveq_thc": lambda: evenkeel.GradiVeQ(evenkeel.THC(bits=4, block=64), sample_steps=4),
}
SHAPES = [(40, 24), (16, 8, 3, 3), (30,), ()]


def naive_masks(vector: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """Where a row is zero, or a column of 8 numbers or more. A vector is a column."""
    mask, start = torch.zeros_like(vector, dtype=torch.bool), 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        shape = (*shape, 1, 1) if len(shape) < 2 else shape
        if size:
            cube = vector[start : start + size].view(shape[0], shape[1], -1)
            for row in range(shape[0]):
                mask[start : start + size].view(cube.shape)[row] |= not bool(cube[row].ne(0).any())
            for column in range(shape[1] if cube[:, 0].numel() >= 8 else 0):
                mask[start : start + size].view(cube.shape)[:, column] |= not bool(cube[:, column].ne(0).any())
        start += size
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_finds_the_zero_lines_and_no_others(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(12, 5), (9,), (6, 4, 3, 3), (2, 20), (0, 3), (1, 9), (30, 1), (5, 2), (), (3,)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    vector = torch.randn(sum(sizes) + 5, generator=generator)[5:]  # as in the middle of a bucket
    vector[torch.rand(len(vector), generator=generator) < 0.3] = 0.0
    share = [0.0, 0.2, 0.9, 1.0][seed % 4]
    for shape, part in zip(shapes, torch.split(vector, sizes), strict=True):
        if len(shape) > 0:
            part.view(shape)[torch.rand(shape[0], generator=generator) < share] = 0.0
        if len(shape) > 1:
            part.view(shape)[:, torch.rand(shape[1], generator=generator) < share / 2] = 0.0
    if seed % 5 == 0:
        vector[3] = torch.nan
        vector[20] = -0.0
    expected = naive_masks(vector, shapes)
    found = ZeroLines.of(vector, shapes, seed)
    assert (found.flags is None) == (not bool(expected.any()))
    marks = torch.ones_like(vector)
    found.clear(marks)
    assert torch.equal(marks == 0, expected)


def test_bits_are_exchanged_only_where_every_rank_has_zeros() -> None:
    shapes = [(50, 20)]

    def work(ranks: Collectives) -> object:
        vectors = [torch.ones(1000) for _ in range(3)]
        vectors[0].view(50, 20)[10 : 20 + ranks.rank] = 0.0
        vectors[1].view(50, 20)[:3] = float(ranks.rank == 1)
        vectors[2].view(50, 20)[:, 5 + ranks.rank :] = 0.0
        mine = [ZeroLines.of(vector, shapes, 0) for vector in vectors]
        before = ranks.sent_bytes
        nothing = zero_on_all(ranks, mine, [False, False, False])
        assert ranks.sent_bytes == before
        assert all(each.flags is None for each in nothing)
        zero = zero_on_all(ranks, mine, [True, False, True])
        marks = [torch.ones(1000) for _ in zero]
        for each, mark in zip(zero, marks, strict=True):
            each.clear(mark)
        return ranks.sent_bytes - before, marks

    for sent, marks in in_threads(3, work):
        assert sent == 2 * -(-2 * 70 // 8)  # to two others, a bit for each row and column
        expected = [torch.ones(50, 20) for _ in range(3)]
        expected[0][10:20] = 0.0
        expected[2][:, 7:] = 0.0
        assert all(torch.equal(mark.view(50, 20), each) for mark, each in zip(marks, expected, strict=True))


def with_zeros(rank: int, step: int) -> list[Tensor]:
    """Gradients with lines that are zero on all ranks, always or in odd steps, and some that are on rank 1 only."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    matrix, kernels, bias, scale = (torch.randn(shape, generator=generator) for shape in SHAPES)
    matrix[3:9] = 0.0
    matrix[:, 5] = 0.0
    kernels[2] = 0.0
    kernels[:, 1] = 0.0
    bias[20:] = 0.0
    if step % 2:
        scale.zero_()
        matrix[20:25] = 0.0
        kernels[7] = 0.0
    if rank == 1:
        matrix[30] = 0.0
    return [matrix, kernels, bias, scale]


@pytest.mark.parametrize("reducer", [evenkeel.Sharded, FakeReducer])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("name", CODES)
def test_averages_are_zero_where_all_gradients_are(name: str, feedback: bool, reducer: type) -> None:
    def work(ranks: Collectives) -> list:
        state = evenkeel.HookState(CODES[name](), error_feedback=feedback, reducer=reducer(ranks), skip=None)
        model = Model(SHAPES)
        return [model.step(state, with_zeros(ranks.rank, step), [[3, 2, 1, 0]]) for step in range(14)]

    one, other = in_threads(2, work)
    for step, (averages, same) in enumerate(zip(one, other, strict=True)):
        for number, average in enumerate(averages):
            assert torch.equal(average, same[number])
            true = (with_zeros(0, step)[number] + with_zeros(1, step)[number]) / 2
            assert not bool(average[true == 0].any()), (step, number)
        if not name.startswith("low_rank"):
            assert bool(averages[0][30].any())
        if name == "thc":
            true = [(a + b) / 2 for a, b in zip(with_zeros(0, step), with_zeros(1, step), strict=True)]
            assert nmse(averages, true) < 0.05


@pytest.mark.parametrize("name", ["thc", "low_rank_thc", "gradiveq", "fixed_point"])
def test_nothing_is_lost_where_gradients_come_and_go(name: str) -> None:
    """What was averaged and what the ranks still owe add up to all gradients; what a zero row owes waits."""
    steps = 12

    def work(ranks: Collectives) -> tuple:
        state = evenkeel.HookState(CODES[name](), reducer=evenkeel.Sharded(ranks), skip=None)
        model = Model(SHAPES)
        owed_by_row, total = [], [torch.zeros(shape) for shape in SHAPES]
        for step in range(steps):
            averages = model.step(state, with_zeros(ranks.rank, step), [[0, 1, 2, 3]])
            total = [a + b for a, b in zip(total, averages, strict=True)]
            if step >= 2:
                (memory,) = state.state_dict()["code"]["memory"].values()
                owed_by_row.append(memory[: 40 * 24].view(40, 24)[20:25])
        return total, memory, owed_by_row

    (total, owed, rows), (_, owed_too, _) = in_threads(2, work)
    given = [
        sum((with_zeros(rank, step)[number] for step in range(steps) for rank in range(2)), torch.zeros(shape)) / 2
        for number, shape in enumerate(SHAPES)
    ]
    found = torch.cat([each.flatten() for each in total]) + (owed + owed_too) / 2
    assert torch.allclose(found, torch.cat([each.flatten() for each in given]), atol=1e-3)
    for step, (before, after) in enumerate(pairwise(rows), start=3):
        if step % 2:
            assert torch.equal(before, after)
        elif name != "gradiveq":  # which leaves matrices as they are
            assert not torch.equal(before, after)


def test_a_lost_message_of_rows_without_a_gradient_owes_nothing_for_them() -> None:
    def work(ranks: Collectives) -> Tensor:
        lose = lambda this_round, granules: torch.full([granules], this_round.rank == 1 and this_round.step == 2)
        state = evenkeel.HookState(evenkeel.THC(bits=4), reducer=FakeReducer(ranks, lose))
        model = Model(SHAPES[:1])
        for step in range(3):
            model.step(state, with_zeros(ranks.rank, step)[:1], [[0]])
        return state.state_dict()["code"]["memory"][0].view(40, 24)

    kept, lost = in_threads(2, work)
    assert not bool(kept[3:9].any())
    assert not bool(lost[3:9].any())
    assert nmse([lost], [with_zeros(1, 2)[0]]) < 1e-9


@pytest.mark.parametrize(("name", "said"), [("thc", 1), ("low_rank", 1), ("fixed_point", 0)])
def test_single_zeros_that_no_row_explains_are_hinted_at_once(
    name: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    (ranks,) = thread_collectives(1)
    state, model = evenkeel.HookState(CODES[name](), reducer=evenkeel.Sharded(ranks)), Model(SHAPES)
    mask = torch.rand(40, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    for step in range(5):
        matrix, *others = with_zeros(0, step)
        model.step(state, [matrix * mask, *others], [[3, 2, 1, 0]])
    hints = [record.getMessage() for record in caplog.records if "scattered" in record.getMessage()]
    assert len(hints) == said
    assert all("parameter of shape (40, 24)" in hint for hint in hints)


def a_padded_and_a_pruned_model_stay_so() -> list[str]:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(300, 16, padding_idx=0)
            self.convolve = nn.Conv2d(1, 16, 3, padding=1, bias=False)
            self.mix = nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16 * 6 * 16, 4)
            self.register_buffer("mask", (torch.arange(16) % 4 != 1).float()[:, None, None, None])

        def forward(self, words: Tensor) -> Tensor:
            maps = self.embed(words)[:, None]
            maps = torch.tanh(nn.functional.conv2d(maps, self.convolve.weight * self.mask, padding=1))
            return self.head(torch.tanh(self.mix(maps)).flatten(1))

    done = []
    for name, make in CODES.items():
        state = evenkeel.HookState(make())
        ddp = DistributedDataParallel(Words())
        ddp.register_comm_hook(state, evenkeel.comm_hook)
        before = {key: value.clone() for key, value in ddp.module.state_dict().items()}
        optimizer = torch.optim.AdamW(list(ddp.parameters()), 1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(12):
            words = torch.randint(1, 100, (8, 6), generator=generator)
            words[:, 4:] = 0
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(words), words[:, 0] % 4).backward()
            optimizer.step()
        after = ddp.module.state_dict()
        still = torch.tensor([0, *range(100, 300)])
        assert torch.equal(after["embed.weight"][still], before["embed.weight"][still]), name
        assert torch.equal(after["convolve.weight"][1::4], before["convolve.weight"][1::4]), name
        assert torch.equal(after["mix.weight"][:, 1::4], before["mix.weight"][:, 1::4]), name
        assert not torch.equal(after["embed.weight"][1:100], before["embed.weight"][1:100]), name
        assert not torch.equal(after["mix.weight"][:, 2::4], before["mix.weight"][:, 2::4]), name
        state.close()
        done.append(name)
    return done


def test_two_ranks() -> None:
    assert local_ranks(2, a_padded_and_a_pruned_model_stay_so) == [list(CODES)] * 2
