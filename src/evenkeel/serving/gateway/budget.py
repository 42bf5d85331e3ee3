"""Limits hedges to a share of the load, by a budget of tokens.

Every item earns a fraction of a token, every hedge costs one. When the whole fleet is slow the bucket runs dry and
hedging stops, so that it can never turn a slowdown into a storm (Finagle's retry budget; Envoy and gRPC throttle on
failures instead, which does not bound hedges of calls that are slow but succeed).
"""

__all__ = ["Budget"]


class Budget:
    """Holds the tokens that hedges spend.

    Args:
        share: tokens that one item earns; `inf` never refuses.
        burst: how many tokens can be saved up, at least 1.
    """

    def __init__(self, share: float, burst: float = 10.0) -> None:
        self._share = share
        self._burst = burst
        self._tokens = 1.0 if share > 0 else 0.0  # one slow reply may be hedged before there was time to earn

    def earn(self) -> None:
        """Adds an item's share of a token."""
        tokens = self._tokens + self._share
        self._tokens = tokens if tokens < self._burst else self._burst

    def spend(self) -> bool:
        """Spends a token; False if there is none."""
        if self._share == float("inf"):
            return True
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
