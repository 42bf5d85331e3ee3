"""Slices of a convolution's gradient, in the few directions that hold most of their energy.

Source: Yu, Lin, Narra, Li, Li, Kim, Schwing, Annavaram, Avestimehr, "GradiVeQ: Vector Quantization for
Bandwidth-Efficient Gradient Aggregation in Distributed CNN Training" (NeurIPS 2018). Departures: the directions are
learnt from all slices of the layer instead of the first, and counted by the energy of held-out steps; rank 0 learns
them for all, since eigenvectors differ between machines; no mean is taken off, so zeros stay zeros; coefficients may
travel in another code.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor

from evenkeel.coding.bucket_bases import Basis, BucketBases
from evenkeel.coding.checks import number, whole
from evenkeel.coding.projected import Projected, check_arrangement
from evenkeel.coding.shared_basis import Moments, learn
from evenkeel.coding.sum_code import Broadcast, Place, SumCode, flat
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["GradiVeQ"]

_HOLD_OUT = 4  # every fourth sampled step
_SAMPLES = 4  # slices learnt from, per value of a slice: more would hardly move the directions


class GradiVeQ(Projected):
    """Coefficients of each slice in a basis that all slices of its layer share.

    `arrange` says which parts of a bucket are convolutions (parameters of three dimensions or more). Everything else,
    and everything while sampling, travels in `inner` as it is. A bucket takes turns: `sample_steps` rounds whose means
    are learnt from, then `code_steps` compressed rounds.

    Stated error: the part of the mean outside of the basis, plus the inner code's error of the coefficients. On
    held-out steps the part outside was the share `lost` of the squared norm. It stays away until the basis is learnt
    anew, so wrap the code in ErrorFeedback. All ranks get the same bits if they multiply matrices alike (same library,
    same processor).

    Args:
        inner: codes the coefficients, e.g. THC. None: float32 as they are.
        loss: share of a layer's held-out energy that may be lost. Less: more coefficients.
        ratio: each layer is compressed at least so much, whatever it loses.
        sample_steps: rounds to learn from, 4 or more. Fewer: a higher ratio over all; a coarser choice of directions.
        code_steps: rounds until directions are learnt anew. More: a higher ratio over all; staler directions.
        longest_slice: most values of a slice; learning takes its square in memory and its cube in time, per layer.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name: Final = "gradiveq"

    def __init__(
        self,
        inner: SumCode | None = None,
        loss: float = 0.01,
        ratio: float = 8.0,
        sample_steps: int = 20,
        code_steps: int = 480,
        longest_slice: int = 768,
    ) -> None:
        super().__init__(inner)
        self.loss = number("loss", loss)
        if not 0 < self.loss < 1:
            raise ConfigurationError(f"loss: must be between 0 and 1, found {loss}")
        self.ratio = number("ratio", ratio, 1)
        self.sample_steps = whole("sample_steps", sample_steps, _HOLD_OUT)
        self.code_steps = whole("code_steps", code_steps, 1)
        self.longest_slice = whole("longest_slice", longest_slice)
        if self.longest_slice < self.ratio:
            raise ConfigurationError(f"longest_slice: must be at least the ratio {ratio}, found {longest_slice}")
        self._buckets: dict[int, _Bucket] = {}

    def __repr__(self) -> str:
        return (
            f"GradiVeQ(inner={self.inner!r}, loss={self.loss}, ratio={self.ratio}, sample_steps={self.sample_steps}, "
            f"code_steps={self.code_steps}, longest_slice={self.longest_slice})"
        )

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Which shapes make up a bucket's vector, in order."""
        shapes = [tuple(shape) for shape in shapes]
        known = self._buckets.setdefault(bucket, _Bucket(BucketBases(shapes, self.longest_slice))).vector.shapes
        check_arrangement(bucket, known, shapes)

    def lost(self, bucket: int) -> list[float]:
        """Share of held-out energy that each convolution of a bucket loses while it is compressed, in order."""
        return list(self._buckets[bucket].lost)

    def observe(self, mean: Tensor, place: Place, broadcast: Broadcast) -> None:
        """Samples the mean, or counts a compressed round; at the end of a phase, changes to the other one."""
        self._checked(mean.numel(), place)
        bucket = self._buckets.get(place.bucket)
        if bucket is None or not bucket.vector.layers:
            return
        bucket.rounds += 1
        if bucket.coding:
            if bucket.rounds >= self.code_steps:
                bucket.turn([None] * len(bucket.vector.layers), [])
            return
        self._sample(bucket, mean)
        if bucket.rounds >= self.sample_steps:
            learnt = self._learn(bucket) if place.rank == 0 else None
            bucket.turn(*_share(bucket.vector, learnt, mean.device, broadcast))

    def state_dict(self) -> dict[str, Any]:
        """Each bucket's shapes, phase, bases and samples."""
        return {str(number): bucket.state() for number, bucket in self._buckets.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code.
        """
        try:
            self._buckets = {int(number): _Bucket.of(saved, self.longest_slice) for number, saved in state.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CodeError(f"this is not the state of a GradiVeQ code: {error!r}") from error

    def _sample(self, bucket: "_Bucket", mean: Tensor) -> None:
        if not bool(mean.isfinite().all()):
            return
        mean = flat(mean)
        if not bucket.moments:
            bucket.moments = [Moments.none(layer.size, mean.device) for layer in bucket.vector.layers]
        for layer, moments in zip(bucket.vector.layers, bucket.moments, strict=True):
            wanted = ceil(_SAMPLES * layer.size / self.sample_steps)
            stride = ceil(layer.count / wanted)
            # Another start each round, so that all slices get their turn.
            slices = layer.cut(mean)[bucket.rounds % stride :: stride]
            moments.add(slices, hold_out=bucket.rounds % _HOLD_OUT == 0)

    def _learn(self, bucket: "_Bucket") -> list[tuple[Basis, float]]:
        learnt: list[tuple[Basis, float]] = []
        for moments in bucket.moments or []:
            size = len(moments.learnt)
            most = int(size / self.ratio)
            basis, lost = learn(moments, self.loss, most) if most else (None, 0.0)
            # A layer that had no gradient tells no directions, and with as many as there are values nothing is saved.
            saves = basis is not None and lost < 1 and basis.shape[1] < size
            learnt.append((basis, lost) if saves else (None, 0.0))
        return learnt

    def _projection(self, bucket: int) -> BucketBases | None:
        return self._buckets[bucket].vector if bucket in self._buckets else None


class _Bucket:
    """One bucket's turns.

    Attributes:
        vector: its parts and their bases.
        coding: true in compressed rounds, false while sampling.
        rounds: of this phase, so far.
        lost: see `GradiVeQ.lost`.
        moments: of each layer; empty while coding.
    """

    def __init__(self, vector: BucketBases) -> None:
        self.vector = vector
        self.coding = False
        self.rounds = 0
        self.lost: list[float] = []
        self.moments: list[Moments] = []

    def turn(self, bases: list[Basis], lost: list[float]) -> None:
        """Change to the other phase."""
        self.vector.bases, self.lost = bases, lost
        self.coding, self.rounds, self.moments = not self.coding, 0, []

    def state(self) -> dict[str, Any]:
        return {
            "shapes": self.vector.shapes,
            "bases": self.vector.bases,
            "coding": self.coding,
            "rounds": self.rounds,
            "lost": self.lost,
            "moments": [(moments.learnt.clone(), moments.held_out.clone()) for moments in self.moments],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], longest: int) -> "_Bucket":
        bucket = cls(BucketBases([tuple(shape) for shape in state["shapes"]], longest))
        bucket.vector.bases = list(state["bases"])
        bucket.coding, bucket.rounds, bucket.lost = bool(state["coding"]), int(state["rounds"]), list(state["lost"])
        bucket.moments = [Moments(learnt.clone(), held_out.clone()) for learnt, held_out in state["moments"]]
        return bucket


def _share(
    vector: BucketBases, learnt: list[tuple[Basis, float]] | None, device: torch.device, broadcast: Broadcast
) -> tuple[list[Basis], list[float]]:
    """Rank 0's bases and losses, on every rank: first how many directions, then all numbers in one row."""
    layers = vector.layers
    directions = torch.zeros(len(layers), dtype=torch.int64, device=device)
    lost = torch.zeros(len(layers), device=device)
    for index, (basis, its_loss) in enumerate(learnt or []):
        directions[index] = 0 if basis is None else basis.shape[1]
        lost[index] = its_loss
    broadcast(directions)
    sizes = [layer.size * int(count) for layer, count in zip(layers, directions.tolist(), strict=True)]
    row = torch.zeros(len(layers) + sum(sizes), device=device)
    if learnt:
        row = torch.cat([lost, *(basis.reshape(-1) for basis, _ in learnt if basis is not None)])
    broadcast(row)
    parts = torch.split(row[len(layers) :], sizes)
    bases = [part.view(layer.size, -1) if part.numel() else None for part, layer in zip(parts, layers, strict=True)]
    return bases, row[: len(layers)].tolist()
