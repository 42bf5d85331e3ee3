"""Sends slices of a convolution's gradient in the few directions that hold most of their energy.

Source: Yu, Lin, Narra, Li, Li, Kim, Schwing, Annavaram, Avestimehr, "GradiVeQ: Vector Quantization for
Bandwidth-Efficient Gradient Aggregation in Distributed CNN Training" (NeurIPS 2018). Departures: the directions are
learnt from all slices of the layer instead of the first, and counted by the energy of held-out steps; rank 0 learns
them for all, since eigenvectors differ between machines; no mean is taken off, so zeros stay zeros; coefficients may
travel in another code; in compressed rounds some slices travel whole, in turn, which bounds how old a gradient gets
before it counts and teaches new directions, so that only the first rounds travel as they are.
"""

from collections.abc import Mapping, Sequence
from math import ceil, isqrt
from typing import Any, Final

import torch
from torch import Tensor

from evenkeel.coding.checks import number, whole
from evenkeel.coding.saved_state import (
    saved_fields,
    saved_list,
    saved_numbers,
    saved_shapes,
    saved_tensor,
    saved_whole,
)
from evenkeel.coding.sum_code import Broadcast, SumCode, are_finite, flat
from evenkeel.coding.sums.bucket_bases import Basis, BucketBases
from evenkeel.coding.sums.projected import Projected, check_arrangement
from evenkeel.coding.sums.shared_basis import Moments, learn
from evenkeel.coding.wire import Round
from evenkeel.errors import CodeError, ConfigurationError

__all__ = ["GradiVeQ"]

_HOLD_OUT = 4  # every fourth sampled step
_SAMPLES = 4  # slices learnt from, per value of a slice: more would hardly move the directions
_LONGEST, _TOLD = 768, 0.1  # see longest_slice
_KEPT = 0.5  # of what was learnt from before the latest directions


class GradiVeQ(Projected):
    """Sends each slice's coefficients in a basis that all slices of its layer share, and some slices whole, in turn.

    `arrange` says which parts of a bucket are convolutions (parameters of three dimensions or more). Everything else,
    and everything in the first `sample_steps` rounds, travels in `inner` as it is; those rounds' means are learnt from.
    In each round after them every `turns`-th slice of a layer travels whole, another one each round, and is learnt from
    as well; the others as coefficients.

    Stated error: the part of the mean that is in other slices and outside of the basis, plus the inner code's error. On
    held-out steps the share `lost` of a slice's squared norm was outside. Wrap the code in ErrorFeedback: then it
    arrives in the slice's turn. All ranks get the same bits if they multiply matrices alike (same library, same
    processor).

    Args:
        inner: codes the coefficients, e.g. THC. None: float32 as they are.
        loss: share of a layer's held-out energy that may be lost. Less: more coefficients.
        ratio: each layer is compressed at least so much in a compressed round, on average over the turns.
        sample_steps: first rounds, which are learnt from, 4 or more. Fewer: a higher ratio over all; a coarser choice
            of directions to begin with.
        code_steps: rounds until directions are learnt anew, from the slices that travelled whole. Fewer: more time and
            bytes for directions.
        turns: rounds until each slice has travelled whole, more than `ratio`. Fewer: less waits, and not so long; fewer
            directions for the others. None: four times `ratio`, so that whole slices take a quarter of a round.
        longest_slice: most values of a slice; learning takes its square in memory and its cube in time, per layer.
            None: 768, in small layers less, so that sending directions takes a tenth of what sending slices does.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name: Final = "gradiveq"

    def __init__(
        self,
        inner: SumCode | None = None,
        loss: float = 0.01,
        ratio: float = 8.0,
        sample_steps: int = 10,
        code_steps: int = 100,
        turns: int | None = None,
        longest_slice: int | None = None,
    ) -> None:
        super().__init__(inner)
        self.loss = number("loss", loss)
        if not 0 < self.loss < 1:
            raise ConfigurationError(f"loss: must be between 0 and 1, found {loss}")
        self.ratio = number("ratio", ratio, 1)
        self.sample_steps = whole("sample_steps", sample_steps, _HOLD_OUT)
        self.code_steps = whole("code_steps", code_steps, 1)
        self.turns = ceil(4 * self.ratio) if turns is None else whole("turns", turns, 2)
        if self.turns <= self.ratio:
            raise ConfigurationError(f"turns: must be more than the ratio {ratio}, found {turns}")
        self.longest_slice = None if longest_slice is None else whole("longest_slice", longest_slice)
        if self.longest_slice is not None and self.longest_slice < self.ratio:
            raise ConfigurationError(f"longest_slice: must be at least the ratio {ratio}, found {longest_slice}")
        self._buckets: dict[int, _BucketState] = {}

    def __repr__(self) -> str:
        return (
            f"GradiVeQ(inner={self.inner!r}, loss={self.loss}, ratio={self.ratio}, sample_steps={self.sample_steps}, "
            f"code_steps={self.code_steps}, turns={self.turns}, longest_slice={self.longest_slice})"
        )

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Takes the shapes that make up a bucket's vector, in order."""
        shapes = [tuple(shape) for shape in shapes]
        new = _BucketState(BucketBases(shapes, self._longest, self.turns))
        known = self._buckets.setdefault(bucket, new).vector.shapes
        check_arrangement(bucket, known, shapes)

    def lost(self, bucket: int) -> list[float]:
        """Gives the share of held-out energy that each convolution of a bucket loses while compressed, in order."""
        return list(self._buckets[bucket].lost)

    def observe(self, mean: Tensor, this_round: Round, broadcast: Broadcast) -> None:
        """Learns from the mean's slices that travelled whole; at times, changes to the directions that they have."""
        self._checked(mean.numel(), this_round)
        bucket = self._buckets.get(this_round.bucket)
        if bucket is None or not bucket.vector.convolutions:
            return
        bucket.rounds += 1
        self._sample(bucket, mean)
        if bucket.coding:
            bucket.vector.turn = (bucket.vector.turn + 1) % self.turns
        if bucket.rounds >= (self.code_steps if bucket.coding else self.sample_steps):
            learnt = self._learn(bucket) if this_round.rank == 0 else None
            bucket.renew(*_share(bucket.vector, learnt, mean.device, broadcast))

    def state_dict(self) -> dict[str, Any]:
        """Gives each bucket's shapes, phase, bases and samples."""
        return {str(number): bucket.state() for number, bucket in self._buckets.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code.
        """
        try:
            self._buckets = {
                number: self._restored(f"code[{number}]", saved)
                for number, saved in saved_numbers("code", state).items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CodeError(f"this is not the state of a GradiVeQ code: {error!r}") from error

    def _longest(self, weights: int) -> int:
        """Gives the most values of a slice of a layer."""
        if self.longest_slice is not None:
            return self.longest_slice
        # A direction is as long as a slice and sent once; each slice has one number for it in every round until then.
        return min(_LONGEST, isqrt(int(_TOLD * self.code_steps * weights)))

    def _sample(self, bucket: "_BucketState", mean: Tensor) -> None:
        if not bool(are_finite(mean)):
            return
        mean = flat(mean)
        if not bucket.moments:
            alike = bucket.vector.convolutions
            bucket.moments = [Moments.none(each.layers, each.size, mean.device) for each in alike]
        vector = bucket.vector
        for each, basis, moments in zip(vector.convolutions, vector.bases, bucket.moments, strict=True):
            wanted = ceil(_SAMPLES * each.size / self.sample_steps)
            stride = ceil(each.count / wanted)
            # Another start each round, so that all slices get their turn.
            start = bucket.rounds % stride
            if basis is not None:
                start, _, stride = vector.whole(each)
            moments.add(each.cut(mean)[:, start::stride], hold_out=bucket.rounds % _HOLD_OUT == 0)

    def _learn(self, bucket: "_BucketState") -> list[tuple[Basis, Tensor]]:
        learnt: list[tuple[Basis, Tensor]] = []
        for moments in bucket.moments or []:
            layers, size, _ = moments.learnt.shape
            top = int(size * (1 / self.ratio - 1 / self.turns) / (1 - 1 / self.turns))
            basis, lost = learn(moments, self.loss, top) if top else (None, torch.zeros(layers, dtype=torch.float32))
            # Layers that had no gradient give no directions, and with as many as there are values nothing is saved.
            saves = basis is not None and bool((lost < 1).any()) and basis.shape[2] < size
            learnt.append((basis, lost) if saves else (None, torch.zeros(layers, dtype=torch.float32)))
        return learnt

    def _restored(self, name: str, saved: Mapping[str, Any]) -> "_BucketState":
        saved_fields(name, saved, ("shapes", "bases", "turn", "coding", "rounds", "lost", "moments"))
        shapes = saved_shapes(f"{name}.shapes", saved["shapes"])
        for basis in saved_list(f"{name}.bases", saved["bases"]):
            if basis is not None:
                saved_tensor(f"{name}.bases", basis, (None, None, None))
        saved_whole(f"{name}.turn", saved["turn"])
        saved_whole(f"{name}.rounds", saved["rounds"])
        if not isinstance(saved["coding"], bool):
            raise CodeError(f"{name}.coding: the state must have true or false here, found {saved['coding']!r:.60}")
        lost = saved_list(f"{name}.lost", saved["lost"])
        if not all(isinstance(share, float) for share in lost):
            raise CodeError(f"{name}.lost: the state must have numbers here")
        for pair in saved_list(f"{name}.moments", saved["moments"]):
            for moments in saved_list(f"{name}.moments", pair, 2):
                saved_tensor(f"{name}.moments", moments, (None, None, None), finite=False)  # squares may be too large
        bucket = _BucketState.of(saved, BucketBases(shapes, self._longest, self.turns))
        sizes = [(each.layers, each.size) for each in bucket.vector.convolutions]
        # Nothing has been learnt before the first round.
        bases = [
            size if basis is None else basis.shape[:2] for basis, size in zip(bucket.vector.bases, sizes, strict=True)
        ]
        moments = [tuple(each.learnt.shape[:2]) for each in bucket.moments] or sizes
        if bases != sizes or moments != sizes:
            raise CodeError(
                "this state of a GradiVeQ code was learnt from slices of other sizes: load it into one with the same "
                "longest_slice and, where that is None, the same code_steps"
            )
        if not bucket.moments and any(basis is not None for basis in bucket.vector.bases):
            raise CodeError(f"{name}.moments: the state has directions, but nothing that they were learnt from")
        for (_, size), basis in zip(sizes, bucket.vector.bases, strict=True):
            if basis is not None and not 1 <= basis.shape[2] <= size:
                raise CodeError(f"{name}.bases: the state has {basis.shape[2]} directions of slices of {size} numbers")
        for (layers, size), each in zip(sizes, bucket.moments, strict=bool(bucket.moments)):
            for moments in (each.learnt, each.held_out):
                saved_tensor(f"{name}.moments", moments, (layers, size, size), finite=False)
        if lost or bucket.coding:
            saved_list(f"{name}.lost", lost, sum(layers for layers, _ in sizes))
        return bucket

    def _projection(self, bucket: int) -> BucketBases | None:
        return self._buckets[bucket].vector if bucket in self._buckets else None


class _BucketState:
    """Holds one bucket's state.

    Attributes:
        vector: its parts and their bases.
        coding: true in compressed rounds, false in the first ones.
        rounds: since the latest bases.
        lost: see `GradiVeQ.lost`.
        moments: of each layer.
    """

    def __init__(self, vector: BucketBases) -> None:
        self.vector = vector
        self.coding = False
        self.rounds = 0
        self.lost: list[float] = []
        self.moments: list[Moments] = []

    def renew(self, bases: list[Basis], lost: list[float]) -> None:
        """Expresses slices in these bases from now on."""
        self.vector.bases, self.lost = bases, lost
        self.coding, self.rounds = True, 0
        self.moments = [Moments(_KEPT * each.learnt, _KEPT * each.held_out) for each in self.moments]

    def state(self) -> dict[str, Any]:
        return {
            "shapes": self.vector.shapes,
            "bases": self.vector.bases,
            "turn": self.vector.turn,
            "coding": self.coding,
            "rounds": self.rounds,
            "lost": self.lost,
            "moments": [(moments.learnt.clone(), moments.held_out.clone()) for moments in self.moments],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], vector: BucketBases) -> "_BucketState":
        bucket = cls(vector)
        # With other settings there may be fewer turns.
        vector.bases, vector.turn = list(state["bases"]), int(state["turn"]) % vector.turns
        bucket.coding, bucket.rounds, bucket.lost = bool(state["coding"]), int(state["rounds"]), list(state["lost"])
        bucket.moments = [Moments(learnt.clone(), held_out.clone()) for learnt, held_out in state["moments"]]
        return bucket


def _share(
    vector: BucketBases, learnt: list[tuple[Basis, Tensor]] | None, device: torch.device, broadcast: Broadcast
) -> tuple[list[Basis], list[float]]:
    """Sends rank 0's bases and losses to every rank: first how many directions, then all numbers in one row."""
    convolutions = vector.convolutions
    counts = [0 if basis is None else basis.shape[2] for basis, _ in learnt or []] or [0] * len(convolutions)
    directions = torch.tensor(counts, device=device)
    broadcast(directions)
    sizes = [each.layers * each.size * count for each, count in zip(convolutions, directions.tolist(), strict=True)]
    layers = sum(each.layers for each in convolutions)
    row = torch.zeros(layers + sum(sizes), dtype=torch.float32, device=device)
    if learnt:
        losses = [lost.to(device) for _, lost in learnt]
        row = torch.cat([*losses, *(basis.reshape(-1) for basis, _ in learnt if basis is not None)])
    broadcast(row)
    parts = zip(convolutions, torch.split(row[layers:], sizes), strict=True)
    bases = [part.view(each.layers, each.size, -1) if part.numel() else None for each, part in parts]
    return bases, row[:layers].tolist()
