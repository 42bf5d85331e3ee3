"""Matrices in a few directions of one of their sides, which the round before has found on the other side.

Source: Zhang, Zhang, Shi, Chu, Li, "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning"
(ICDCS 2023), whose ACP-SGD halves a step of Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient
Compression for Distributed Optimization" (NeurIPS 2019): one product and one sum a step instead of two. Departure:
coefficients may travel in another code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from evenkeel.coding.checks import number, whole
from evenkeel.coding.sum_code import Broadcast, Place, SumCode, flat
from evenkeel.coding.sums.bucket_factors import BucketFactors
from evenkeel.coding.sums.counter_hash import key
from evenkeel.coding.sums.projected import Projected, check_arrangement
from evenkeel.errors import CodeError

__all__ = ["LowRank"]


class LowRank(Projected):
    """Each matrix's coefficients in `rank` directions, of its rows and of its columns in turn.

    `arrange` says which parts of a bucket are matrices: parameters of two dimensions or more, `[shape[0], rest]`. A
    round tells them in directions that all ranks share, so it is linear and takes one sum. What the mean was in them
    gives the directions of the other side, for the next round: an iteration of the power method, whose directions
    follow the strongest ones of the gradients as these change. Everything else travels in `inner` as it is.

    Stated error: the part of the mean outside of the directions, plus the inner code's error of the coefficients. The
    first directions are random, and gradients have far more than `rank`, so wrap the code in ErrorFeedback: what is
    outside of one round's directions adds up until it is a strong direction itself. All ranks get the same bits if they
    multiply matrices alike (same library, same processor, same number of threads).

    Args:
        rank: directions. More: less stays behind; more bytes. PowerSGD of the same rank sends twice as many
            numbers and leaves less behind, so take a higher one here.
        inner: codes the coefficients, e.g. THC(bits=4, block=512): a sixth of the bytes. None: float32 as they are.
        min_ratio: matrices that do not shrink so much, in numbers and on average of both sides, stay as they are.
        seed: of the first directions; the same on all ranks.

    Raises:
        ConfigurationError: a setting out of range.
    """

    name: Final = "low_rank"

    def __init__(self, rank: int = 16, inner: SumCode | None = None, min_ratio: float = 2.0, seed: int = 0) -> None:
        super().__init__(inner)
        self.rank = whole("rank", rank, 1)
        self.min_ratio = number("min_ratio", min_ratio, 1)
        self.seed = whole("seed", seed)
        self._buckets: dict[int, BucketFactors] = {}

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}, inner={self.inner!r}, min_ratio={self.min_ratio}, seed={self.seed})"

    def arrange(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """Which shapes make up a bucket's vector, in order."""
        shapes = [tuple(shape) for shape in shapes]
        if bucket not in self._buckets:
            self._buckets[bucket] = self._first(bucket, shapes)
        check_arrangement(bucket, self._buckets[bucket].shapes, shapes)

    def observe(self, mean: Tensor, place: Place, broadcast: Broadcast) -> None:
        """Turns each matrix to its other side; where the mean is zero or not finite, it stays as it is."""
        bucket = self._checked(mean.numel(), place)
        if bucket is not None:
            self._buckets[place.bucket].turn(flat(mean))

    def state_dict(self) -> dict[str, Any]:
        """Each bucket's shapes, and the sides and directions of its matrices."""
        return {
            str(number): {
                "shapes": bucket.shapes,
                "turned": [matrix.turned for matrix in bucket.matrices],
                "bases": [matrix.basis.clone() for matrix in bucket.matrices],
            }
            for number, bucket in self._buckets.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CodeError: it is the state of another code, or of other settings.
        """
        try:
            self._buckets = {int(number): self._restored(int(number), saved) for number, saved in state.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CodeError(f"this is not the state of a LowRank code with these settings: {error!r}") from error

    def _projection(self, bucket: int) -> BucketFactors | None:
        return self._buckets.get(bucket)

    def _first(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> BucketFactors:
        return BucketFactors(shapes, self.rank, self.min_ratio, key(self.seed, bucket))

    def _restored(self, number: int, saved: Mapping[str, Any]) -> BucketFactors:
        bucket = self._first(number, [tuple(shape) for shape in saved["shapes"]])
        bucket.restore(saved["turned"], saved["bases"])
        return bucket
