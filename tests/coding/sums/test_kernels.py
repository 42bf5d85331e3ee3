"""Kernels against their plain torch twins, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums import kernels
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.integer_lanes import pack_bits, unpack_bits
from evenkeel.coding.sums.kernels import MAX_WORKERS, cpu, fast, threads, twins_only
from evenkeel.coding.sums.rounding import Rounding
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from sum_rounds import lanes_of

TABLES = [(1, 1), (1, 7), (2, 3), (3, 7), (4, 15), (4, 17), (4, 30), (4, 60), (5, 31), (6, 80), (7, 127), (8, 255)]
PECULIAR = ["zeros", "infinite", "nan", "huge", "tiny", "one_hot"]


@dataclass(frozen=True)
class Case:
    """What one test encodes, adds and decodes."""

    code: THC
    this_round: Round
    length: int
    messages: int
    scale: float
    peculiar: dict[int, str]
    seed: int

    def vector(self, rank: int, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        vector = torch.randn(self.length, generator=generator) * self.scale
        for block, how in self.peculiar.items():
            part = vector[block * self.code.granule : (block + 1) * self.code.granule]
            if how == "one_hot":
                part[1:] = 0
            elif part.numel():
                part.mul_({"huge": 3e38, "tiny": 1e-44}.get(how, 1.0))
                part[rank % len(part)] = {"infinite": torch.inf, "nan": torch.nan}.get(how, 1.0)
                part.mul_(0.0 if how == "zeros" else 1.0)
        return vector.to(device)


@st.composite
def rounds(draw: st.DrawFn, tables: list[tuple[int, int]] = TABLES) -> Case:
    bits, granularity = draw(st.sampled_from(tables))
    block = 2 ** draw(st.sampled_from([3, 4, 5, 6, 9, 10, 12]))
    rounding: Rounding = draw(st.sampled_from(["correlated", "correlated", "stochastic", "nearest"]))
    world = draw(st.sampled_from([1, 2, 3, 4, 8, 15, 16, 100, MAX_WORKERS]))
    return Case(
        code=THC(bits, granularity, None, rounding, block, seed=draw(st.integers(0, 2**40))),
        this_round=Round(
            draw(st.integers(0, min(world, 100) - 1)), world, draw(st.integers(0, 9)), draw(st.integers(0, 3))
        ),
        length=draw(st.integers(0, 9) | st.integers(0, 3 * block) | st.sampled_from([block - 1, block, block + 1])),
        messages=min(world, draw(st.integers(1, 4))),
        scale=10.0 ** draw(st.sampled_from([0, 0, 0, -42, -30, 30, 36])),
        peculiar=draw(st.dictionaries(st.integers(0, 3), st.sampled_from(PECULIAR), max_size=2)),
        seed=draw(st.integers(0, 999)),
    )


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Same type, same bits; NaN where there is a NaN."""
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (numbers.nan_to_num(0.0).view(torch.int32) for numbers in (found, expected))
    assert torch.equal(found, expected)


def assert_agrees(case: Case, device: str = "cpu") -> None:
    code, this_round, wire = case.code, case.this_round, case.code.wire(case.this_round.world)
    ranks = [
        Round((this_round.rank + k) % this_round.world, this_round.world, this_round.step, this_round.bucket)
        for k in range(case.messages)
    ]
    vectors = [case.vector(rank.rank, device) for rank in ranks]
    memory = case.vector(this_round.rank + 1000, device).flip(0) / 3
    left = memory.clone()
    with twins_only():
        owed_stats = code.measure_owed(vectors[0], memory, this_round)
        owed_packed = code.encode_owed(vectors[0], left, owed_stats, this_round)
        own = [code.measure(vector, rank) for vector, rank in zip(vectors, ranks, strict=True)]
        stats = torch.stack(own).amax(0)
        message = lanes_of(code, vectors[0], stats, this_round)
        parts = [code.encode(vector, stats, rank) for vector, rank in zip(vectors, ranks, strict=True)]
        total = wire.add(parts, message.numel())
        packed = wire.pack_total(total)
        unpacked = wire.unpack_total(packed, message.numel())
        generator = torch.Generator().manual_seed(case.seed)
        counts = torch.randint(0, min(this_round.world, 5) + 1, stats.shape, generator=generator).to(device)
        means = [code.decode(Total(total, count), stats, case.length, this_round) for count in (case.messages, counts)]
    torch.testing.assert_close(code.measure(vectors[0], this_round), own[0], rtol=2**-23, atol=0, equal_nan=True)
    assert_same(lanes_of(code, vectors[0], stats, this_round), message)
    assert_same(code.encode(vectors[0], stats, this_round), parts[0])
    assert_same(wire.unpack(parts[0], message.numel()), message)
    found = code.measure_owed(vectors[0], memory, this_round)
    torch.testing.assert_close(found, owed_stats, rtol=2**-23, atol=0, equal_nan=True)
    assert_same(code.encode_owed(vectors[0], memory, owed_stats, this_round), owed_packed)
    assert_same(memory, left)
    assert_same(wire.add(parts, message.numel()), total)
    assert_same(wire.pack_total(total), packed)
    assert_same(wire.unpack_total(packed, message.numel()), unpacked)
    for count, mean in zip((case.messages, counts), means, strict=True):
        assert_same(code.decode(Total(total, count), stats, case.length, this_round), mean)
        assert_same(code.decode(Total(packed, count, packed=True), stats, case.length, this_round), mean)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=rounds())
def test_the_cpu_agrees_with_the_twins(case: Case) -> None:
    assert_agrees(case)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Triton's kernels, for CPU tensors, statement by statement in Python."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels are tested there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="Triton is not installed")
        gpu = import_module("evenkeel.coding.sums.kernels.gpu")
        patch.setattr(kernels, "_of_device", lambda kind: gpu)
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinity times zero
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # too slow to shrink
@given(case=rounds())
def test_the_interpreted_gpu_agrees_with_the_twins(case: Case) -> None:
    assert_agrees(case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=rounds())
def test_the_gpu_agrees_with_the_twins(case: Case) -> None:
    assert fast(torch.zeros(1, device="cuda")) is not None, "Triton is missing"
    assert_agrees(case, "cuda")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(1, 31), length=st.integers(1, 40) | st.integers(500, 1100))
def test_bits_of_any_width_agree(data: st.DataObject, width: int, length: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    numbers = torch.randint(0, 2**width, (length,), generator=generator, dtype=torch.int32)
    with twins_only():
        packed = pack_bits(numbers, width)
    assert_same(pack_bits(numbers, width), packed)
    assert_same(unpack_bits(packed, width, length), numbers.to(torch.uint8 if width <= 8 else torch.int32))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that ran."""
    names: list[str] = []

    def share_out(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.__name__)
        threads.share_out(kernel, *arguments)

    monkeypatch.setattr(cpu, "share_out", share_out)
    return names


def one_round(code: SumCode, vector: Tensor, this_round: Round) -> Tensor:
    stats = code.measure(vector, this_round)
    packed = code.encode(vector, stats, this_round)
    lanes = code.lanes(len(vector), this_round)
    wire = code.wire(this_round.world)
    total = wire.pack_total(wire.add([packed, packed], lanes))
    return code.decode(Total(total, 2, packed=True), stats, len(vector), this_round)


def test_ordinary_tensors_take_the_kernels_in_the_fewest_passes(used: list[str]) -> None:
    one_round(THC(), torch.randn(5000), Round(0, 4))
    assert used == ["squares", "encode_packed", "add_parts", "pack", "decode_packed"]


def test_error_feedback_takes_no_pass_of_its_own(used: list[str]) -> None:
    code, this_round = ErrorFeedback(THC()), Round(0, 4)
    for _ in range(2):
        used.clear()
        one_round(code, torch.randn(5000), this_round)
        assert used == ["squares", "encode_owed", "add_parts", "pack", "decode_packed"]


def test_unpacking_looks_numbers_up_in_the_kernel(used: list[str]) -> None:
    packed = torch.arange(200, dtype=torch.uint8)
    found = THC().wire(4).unpack(packed, 400)
    assert used == ["add_parts"]
    with twins_only():
        assert_same(found, THC().wire(4).unpack(packed, 400))


@pytest.mark.parametrize("memory", [torch.ones(300, dtype=torch.float64), torch.ones(600)[::2]])
def test_a_memory_that_the_kernels_cannot_read_takes_the_twin(used: list[str], memory: Tensor) -> None:
    code, this_round, vector = THC(block=64), Round(1, 4), torch.randn(300)
    kept, left = memory.float().contiguous(), memory.clone()
    stats = code.measure_owed(vector, kept, this_round)
    packed = code.encode_owed(vector, kept, stats, this_round)
    assert "encode_owed" in used
    used.clear()
    with twins_only():
        code.measure_owed(vector, memory, this_round)
    assert_same(code.encode_owed(vector, memory, stats, this_round), packed)
    assert "encode_owed" not in used
    torch.testing.assert_close(memory.float(), kept)
    assert not torch.equal(memory, left)


def test_threads_change_nothing_of_what_is_left_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    code, this_round, vector = THC(bits=3), Round(2, 4), torch.randn(5 * 2**16 + 77)
    stats, left = code.measure(2 * vector, this_round), []
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        memory = vector.clone()
        code.encode_owed(vector, memory, stats, this_round)
        left.append(memory)
    assert_same(*left)


def test_what_the_kernels_cannot_read_takes_the_twin_and_gives_the_same(used: list[str]) -> None:
    code, this_round, vector = THC(block=64), Round(1, 4), torch.randn(300, dtype=torch.float64)
    stats = code.measure(vector, this_round)
    message = lanes_of(code, vector, stats, this_round)
    mean = code.decode(Total(message, 1), stats, 300, this_round)
    used.clear()
    assert_same(code.decode(Total(message.long(), 1), stats, 300, this_round), mean)
    assert_same(code.decode(Total(message.repeat_interleave(2)[::2], 1), stats, 300, this_round), mean)
    assert_same(lanes_of(code, vector, stats.double(), this_round), message)
    assert_same(lanes_of(code, vector[:0], stats[:0], this_round), message[:0])
    crowd = Round(0, MAX_WORKERS + 1)
    code.encode(vector, stats, crowd)
    with twins_only():
        one_round(code, vector, this_round)
    assert set(used) <= {"pack", "add_parts"}  # of the bytes, whoever coded them


def test_without_numba_the_twins_do_the_work(monkeypatch: pytest.MonkeyPatch, used: list[str]) -> None:
    vector, this_round = torch.randn(300), Round(1, 4)
    expected = one_round(THC(), vector, this_round)
    used.clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    kernels._of_device.cache_clear()
    try:
        assert fast(vector) is None
        assert_same(one_round(THC(), vector, this_round), expected)
    finally:
        kernels._of_device.cache_clear()
    assert used == []


@pytest.mark.parametrize("code", [THC(), THC(bits=3, block=64), FixedPoint(bits=5), ErrorFeedback(THC(bits=5))])
def test_wire_forms_may_be_cut_at_granules(code: SumCode) -> None:
    this_round, vector = Round(1, 4), torch.randn(3 * code.granule + 100)
    stats = code.measure(vector, this_round)
    lanes, wire = code.lanes(len(vector), this_round), code.wire(4)
    packed = code.encode(vector, stats, this_round)
    message = wire.unpack(packed, lanes)
    shares = [2 * code.granule, lanes - 2 * code.granule]
    cut = packed.split([wire.message_bytes(share) for share in shares])
    for share, part, numbers in zip(shares, cut, message.split(shares), strict=True):
        assert_same(wire.unpack(part, share), numbers)
        assert_same(wire.add([part], share), numbers)
    total = torch.cat([wire.pack_total(numbers) for numbers in message.split(shares)])
    mean = code.decode(Total(total, 1, packed=True), stats, len(vector), this_round)
    assert_same(mean, code.decode(Total(message, 1), stats, len(vector), this_round))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    code, this_round, vector = THC(bits=3), Round(2, 4), torch.randn(5 * 2**16 + 77)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = one_round(code, vector, this_round)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_same(one_round(code, vector, this_round), alone)


def test_several_python_threads_may_code_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    code, vector = THC(), torch.randn(2**17 + 5)
    places = [Round(1, 4, step) for step in range(8)]
    expected = [one_round(code, vector, this_round) for this_round in places]
    with ThreadPoolExecutor(4) as pool:
        for found, mean in zip(
            pool.map(lambda this_round: one_round(code, vector, this_round), places), expected, strict=True
        ):
            assert_same(found, mean)


def test_all_parts_are_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for parts, lanes in ((0, 4096), (1, 4096), (100, 4096), (7, 2**20)):
        done: list[int] = []
        threads.share_out(lambda first, last, out: out.extend(range(first, last)), parts, lanes, done)
        assert sorted(done) == list(range(parts))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads, which is what is tested
def test_a_forked_process_makes_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    done: list[int] = []
    work = (lambda first, last: done.extend(range(first, last))), 2, 2**20
    threads.share_out(*work)
    child = os.fork()
    if not child:
        threads.share_out(*work)
        os._exit(0 if sorted(done) == [0, 0, 1, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0


WITHOUT_COMPILING = """
import torch
from evenkeel.coding.sums.kernels import fast
from evenkeel.coding.sums.thc import THC

print(fast(torch.ones(1)))
THC(bits=4).prepare(2, torch.device("cpu"))
"""


def test_twins_do_where_numba_may_not_compile() -> None:
    command, environment = [sys.executable, "-c", WITHOUT_COMPILING], {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "None\n"
