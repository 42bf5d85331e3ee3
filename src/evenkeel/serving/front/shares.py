"""Shares the gateway's room among clients while it is overloaded, so that a few greedy ones do not keep others out.

A client that asks again the moment it is refused would else take every place that becomes free. So, from the moment the
gateway refuses an item until nobody has been refused for a while, a quarter of its places is kept for clients that had
much less than their share of what was taken; where several addresses ask, half of that is for whole addresses.
"""

from collections.abc import Callable

from evenkeel.errors import OverloadedError

__all__ = ["Client", "FairShares"]

_OPEN_SHARE = 0.75  # of the places, for everyone
_CLIENT_SHARE = 0.875  # for connections that had much less than their share, where several addresses ask
_EVERY_SHARE = 2.0  # for addresses that had much less, or connections of the only one: the gateway itself decides
_MUCH_LESS = 4  # a share divided by this
_CALM_S = 2.0  # without a refusal, after which everyone may have every place again
_PERIOD_S = 1.0  # clients that asked in this period or the one before are counted
_GROWTH = 1.05  # of the places in a period: there may be more of them than when the gateway last refused


class Client:
    """One connection, as far as its share is concerned.

    Args:
        address: of the peer; several clients may have the same.
    """

    __slots__ = ("address", "due")

    def __init__(self, address: str) -> None:
        self.address = address
        self.due = 0  # how many items must have been taken before it may use the places kept free


class FairShares:
    """Decides whom to refuse before the gateway is full.

    Args:
        in_flight: gives the number of items that the gateway has taken and not answered.
        time_s: gives the time.
    """

    def __init__(self, in_flight: Callable[[], int], time_s: Callable[[], float]) -> None:
        self._in_flight = in_flight
        self._time_s = time_s
        self._places: float | None = None  # None: not overloaded
        self._calm_at_s = 0.0
        self._next_period_s = 0.0
        self._taken = 0
        self._clients: tuple[set[Client], set[Client]] = set(), set()  # that asked in this period, in the one before
        self._addresses: tuple[dict[str, int], dict[str, int]] = {}, {}  # the same, with their dues

    def admit(self, client: Client, count: int) -> None:
        """See whether the gateway may be asked to take `count` items from `client`.

        Raises:
            OverloadedError: the places that are left are kept for others.
        """
        if self._places is None:
            return
        now = self._time_s()
        if now >= self._calm_at_s:
            self._places = None
            self._clients, self._addresses = (set(), set()), ({}, {})
            return
        if now >= self._next_period_s:
            self._next_period_s = now + _PERIOD_S
            self._places *= _GROWTH
            self._clients = set(), self._clients[0]
            self._addresses = {}, self._addresses[0]
        self._clients[0].add(client)
        addresses, before = self._addresses
        due = addresses.setdefault(client.address, before.get(client.address, 0))
        several = len(addresses.keys() | before.keys()) > 1
        used = (self._in_flight() + count) / self._places
        share = _OPEN_SHARE
        if several and due <= self._taken:
            share = _EVERY_SHARE
        elif client.due <= self._taken:
            share = _CLIENT_SHARE if several else _EVERY_SHARE
        if used > share:
            self._calm_at_s = now + _CALM_S
            raise OverloadedError("all queues are nearly full, and others had less; try again later")

    def took(self, client: Client, count: int) -> None:
        """Say that the gateway took them."""
        if self._places is None:
            return
        self._taken += count
        client.due = self._taken + _MUCH_LESS * count * max(map(len, self._clients))
        self._addresses[0][client.address] = self._taken + _MUCH_LESS * count * max(map(len, self._addresses))

    def refused(self, count: int) -> None:
        """Say that the gateway had no room for them."""
        now = self._time_s()
        if self._places is None:
            self._next_period_s = now + _PERIOD_S
        self._places = max(1.0, float(self._in_flight() + count - 1))
        self._calm_at_s = now + _CALM_S
