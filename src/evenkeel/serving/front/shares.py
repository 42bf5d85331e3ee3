"""Shares the gateway's room among clients while it is overloaded, so that a few greedy ones do not keep others out.

A client that asks again the moment it is refused would else take every place that becomes free. So, from the moment the
gateway refuses an item until nobody has been refused for a while, a client may use the more of its places the longer
ago, in turns, the last of its items was taken: a turn is as many items as clients ask. The last eighth is for clients
that wait as long as `Retry-After` says. A client is a connection; where several addresses ask, an address has turns,
too.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from evenkeel.errors import OverloadedError

__all__ = ["Client", "FairShares"]

_OPEN_SHARE = 0.75  # of the places, for everyone
_TURNS_SHARE = 0.125  # as much again for those who waited long enough
_HEEDED_SHARE = 0.125  # and again for those who wait as long as Retry-After says
_MAX_TURNS = 2.0  # more count as this many
_HEEDS_FROM_S = 0.9  # after a refusal; Retry-After is never less than a second
_FORGIVEN_S = 10.0  # after having come back too soon
_CALM_S = 2.0  # without a refusal, after which everyone may have every place again
_PERIOD_S = 1.0  # clients with requests in this period or the one before are counted
_GROWTH = 1.05  # of the places in a period: there may be more of them than when the gateway last refused


class _Had:
    """Remembers what a client or an address was last given."""

    __slots__ = ("count", "taken")

    def __init__(self) -> None:
        self.count = 0  # items; none yet
        self.taken = 0  # of all items, the place of the last one

    def turns(self, taken: int, others: int) -> float:
        """Counts the turns since then, when `taken` items have been taken in all and so many ask."""
        return min((taken - self.taken) / (self.count * others), _MAX_TURNS) if self.count else _MAX_TURNS


class Client:
    """Stands for one connection.

    Args:
        address: of the peer; several clients may have the same.
    """

    __slots__ = ("__weakref__", "address")

    def __init__(self, address: str) -> None:
        self.address = address


class _Standing:
    """Remembers how a client stands with one gateway."""

    __slots__ = ("had", "hasty_until_s", "wait_until_s")

    def __init__(self) -> None:
        self.had = _Had()
        self.wait_until_s = 0.0  # as Retry-After said
        self.hasty_until_s = 0.0  # because it did not


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
        self._standings: WeakKeyDictionary[Client, _Standing] = WeakKeyDictionary()  # of those connected
        self._clients: tuple[set[Client], set[Client]] = set(), set()  # with requests in this period, in the one before
        self._addresses: tuple[dict[str, _Had], dict[str, _Had]] = {}, {}  # the same

    def admit(self, client: Client, count: int) -> None:
        """Checks that the share of `client` allows `count` more items.

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
        standing = self._standing(client)
        if now < standing.wait_until_s:
            standing.hasty_until_s = now + _FORGIVEN_S
        turns = standing.had.turns(self._taken, self._count(self._clients))
        heeds = now >= standing.hasty_until_s
        self._clients[0].add(client)
        addresses, before = self._addresses
        address = addresses.setdefault(client.address, before.get(client.address) or _Had())
        if self._count(self._addresses) > 1:
            of_address = address.turns(self._taken, self._count(self._addresses))
            turns = max(turns, of_address)
            heeds = heeds or of_address >= _MAX_TURNS
        share = _OPEN_SHARE + _TURNS_SHARE * turns / _MAX_TURNS + _HEEDED_SHARE * heeds
        in_flight = self._in_flight()
        # With nothing in flight there is nothing to share, however few places there seemed to be.
        if share < 1 and in_flight and in_flight + count > share * self._places:
            self._must_wait(client, now)
            raise OverloadedError("all queues are nearly full, and others waited longer; try again later")

    def took(self, client: Client, count: int) -> None:
        """Notes that the gateway took them."""
        if self._places is None:
            return
        self._taken += count
        for had in (self._standing(client).had, self._addresses[0].get(client.address)):
            if had is not None:
                had.taken, had.count = self._taken, count

    def refused(self, client: Client, count: int) -> None:
        """Notes that the gateway had no room for them."""
        if not self._in_flight():  # it is not full but not ready, or they were more than it ever holds
            return
        now = self._time_s()
        if self._places is None:
            self._next_period_s = now + _PERIOD_S
        self._places = max(1.0, float(self._in_flight() + count - 1))
        self._must_wait(client, now)

    def _standing(self, client: Client) -> _Standing:
        standing = self._standings.get(client)
        if standing is None:
            standing = self._standings[client] = _Standing()
        return standing

    def _must_wait(self, client: Client, now: float) -> None:
        self._standing(client).wait_until_s = now + _HEEDS_FROM_S
        self._calm_at_s = now + _CALM_S

    @staticmethod
    def _count(recent: "tuple[set[Client], set[Client]] | tuple[dict[str, _Had], dict[str, _Had]]") -> int:
        return max(len(recent[0]), len(recent[1]), 1)
