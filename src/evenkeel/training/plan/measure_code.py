"""Measures what a code costs on the group that will train: whole rounds, not formulas."""

from dataclasses import replace

import torch

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.wire import Round
from evenkeel.reducers.reducer import Reducer
from evenkeel.reducers.sharded import Sharded
from evenkeel.training.hook.bucket_average import BucketPlan, Unit, average_bucket
from evenkeel.training.hook.stats import Meter
from evenkeel.training.plan.timing import CodeCost, NetworkLink, comm_s

__all__ = ["measure_code"]

_CODED = 2**20  # coordinates on which a code is timed
_ROUNDS = 5  # and one before, which compiles


def measure_code(
    code: SumCode,
    parameters: int,
    link: NetworkLink,
    *,
    reducer: Reducer | None = None,
    name: str | None = None,
    device: torch.device | str = "cpu",
) -> CodeCost:
    """Measures what a gradient costs with a sum code, by whole rounds on the group that will train.

    The rounds are the hook's own, one bucket of noise each. What their exchanges take beyond the link's formula is
    kept apart: direct messages go at another rate than a ring, and ranks wait for each other's coding.

    Args:
        code: any; it is used up, so give one of its own. One that learns (GradiVeQ, LowRank) is timed
            as it is before it has learnt.
        parameters: of the gradient.
        link: as `measure_link` found it.
        reducer: who adds; the ranks themselves, each its share, unless another is given.
        name: for tables; the code's own by default.
        device: where the gradients will be.
    """
    reducer = reducer or Sharded()
    ranks, workers = reducer.ranks, reducer.ranks.world
    coordinates = min(parameters, _CODED)
    noise = torch.randn(coordinates, dtype=torch.float32, generator=torch.Generator().manual_seed(ranks.rank)).to(
        device
    )
    laps = []
    for step in range(1, _ROUNDS + 2):
        bucket, meter = noise.clone(), Meter()
        ranks.add(torch.zeros(1, dtype=torch.float32, device=device))  # so that nobody begins before the others
        average_bucket(bucket, BucketPlan(step, 1.0, [Unit(0, [bucket])], [], metered=True), code, reducer, meter)
        laps.append([meter.encode_s, meter.add_s + meter.decode_s, meter.communicate_s])
    medians = torch.tensor(laps[1:], dtype=torch.float32).median(0).values.to(device)
    encode_s, decode_s, exchange_s = (ranks.add(medians) / workers).tolist()
    this_round = Round(ranks.rank, workers)
    stats_bytes = 4 * code.measure(noise, this_round).numel()

    def cost(count: int) -> CodeCost:
        lanes, wire, scale = code.lanes(count, this_round), code.wire(workers), count / coordinates
        return CodeCost(
            name or code.name,
            up_bytes=wire.message_bytes(lanes) + stats_bytes * scale,
            down_bytes=wire.total_bytes(lanes) + stats_bytes * scale,
            added_bytes=0.0,  # is in the time to decode
            encode_s=encode_s * scale,
            decode_s=decode_s * scale,
            collectives=2 if stats_bytes else 1,
            harm=2,
        )

    excess_s = max(0.0, exchange_s - comm_s(link, workers, cost(coordinates)))
    return replace(cost(parameters), excess_s=excess_s * parameters / coordinates)
