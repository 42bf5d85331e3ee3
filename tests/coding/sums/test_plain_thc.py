"""PlainTHC is THC without kernels: the same bytes, sums and means, bit for bit, with the same statistics."""

import torch
from hypothesis import given, settings, strategies as st

from evenkeel.coding.sums.plain_thc import PlainTHC
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    block=st.sampled_from([8, 64, 1024]),
    length=st.integers(0, 200) | st.integers(1000, 3000),
    world=st.integers(1, 20),
    rounding=st.sampled_from(["correlated", "stochastic", "nearest"]),
    seed=st.integers(0, 99),
)
def test_both_give_the_same_bits(bits: int, block: int, length: int, world: int, rounding: str, seed: int) -> None:
    settings_of_both = {"bits": bits, "block": block, "rounding": rounding, "seed": seed}
    plain, fast = PlainTHC(**settings_of_both), THC(**settings_of_both)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(world, length, generator=generator)
    rounds = [Round(rank, world, step=seed) for rank in range(world)]
    stats = torch.stack([plain.measure(vector, own) for vector, own in zip(vectors, rounds, strict=True)]).amax(0)
    torch.testing.assert_close(fast.measure(vectors[0], rounds[0]), plain.measure(vectors[0], rounds[0]))
    messages = [plain.encode(vector, stats, own) for vector, own in zip(vectors, rounds, strict=True)]
    for vector, own, message in zip(vectors, rounds, messages, strict=True):
        assert torch.equal(fast.encode(vector, stats, own), message)
    lanes, wire, other = plain.lanes(length, rounds[0]), plain.wire(world), fast.wire(world)
    sums = wire.add(messages, lanes)
    packed = wire.pack_total(sums)
    assert torch.equal(other.add(messages, lanes), sums)
    assert torch.equal(other.pack_total(sums), packed)
    mean = plain.decode(Total(sums, world), stats, length, rounds[0])
    for total in (Total(sums, world), Total(packed, world, packed=True)):
        for code in (plain, fast):
            assert torch.equal(code.decode(total, stats, length, rounds[0]), mean)
