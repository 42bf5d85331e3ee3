"""Greedy clients and a polite one at a gateway with few places, in turns instead of time."""

import random

import pytest

from evenkeel.errors import OverloadedError
from evenkeel.serving.front.shares import Client, FairShares

PLACES = 64


class Gateway:
    """Takes items while it has places; `step` frees some, oldest first, as greedy clients rush in."""

    def __init__(self, fair: bool = True) -> None:
        self.held: list[Client] = []
        self.now = 0.0
        self.fair = fair
        self.shares = FairShares(lambda: len(self.held), lambda: self.now)

    def ask(self, client: Client, count: int = 1) -> bool:
        try:
            if self.fair:
                self.shares.admit(client, count)
        except OverloadedError:
            return False
        if len(self.held) + count > PLACES:
            self.shares.refused(client, count)
            return False
        self.held += [client] * count
        self.shares.took(client, count)
        return True


def polite_share(greedy: list[Client], polite: Client, fair: bool = True, rows: int = 1) -> float:
    """The share of the polite client's requests, one a second, that was taken; each millisecond a place is free."""
    gateway, chance = Gateway(fair), random.Random(0)
    taken = asked = 0
    for millisecond in range(20_000):
        gateway.now = millisecond * 1e-3
        if gateway.held:
            gateway.held.pop(0)
        for client in chance.sample(greedy, len(greedy) // 4):
            gateway.ask(client, rows)
        if millisecond % 1000 == 999:
            asked += 1
            taken += gateway.ask(polite)
    return taken / asked


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("addresses", [1, 2])
def test_greedy_clients_do_not_keep_out_a_polite_one(rows, addresses):
    greedy = [Client("a") for _ in range(200)]
    polite = Client("ab"[addresses - 1])
    assert polite_share(greedy, polite, rows=rows) >= 0.9
    assert polite_share(greedy, Client("a"), fair=False) < 0.3


def test_clients_who_heed_and_ask_for_no_more_than_their_share_get_it():
    """All wait a second after a refusal, as told; there are twice as many as are served, and each has its turn."""
    gateway, chance = Gateway(), random.Random(1)
    clients = [Client("a") for _ in range(200)]
    next_ms = {client: chance.randrange(1000) for client in clients}
    served = dict.fromkeys(clients, 0)
    for millisecond in range(40_000):
        gateway.now = millisecond * 1e-3
        if gateway.held and millisecond % 10 == 0:
            gateway.held.pop(0)
        for client in clients:
            if next_ms[client] <= millisecond:
                served[client] += gateway.ask(client)
                next_ms[client] = millisecond + 1000
    assert min(served.values()) >= 10  # a hundred a second for two hundred clients in forty seconds: twenty


def test_who_takes_many_rows_at_once_waits_for_as_many_turns():
    gateway, large, small = Gateway(), Client("a"), Client("a")
    taken = {large: 0, small: 0}
    for millisecond in range(20_000):
        gateway.now = millisecond * 1e-3
        if gateway.held:
            gateway.held.pop(0)
        taken[large] += 8 * gateway.ask(large, 8)
        taken[small] += gateway.ask(small)
    assert taken[small] > taken[large]


def test_an_address_with_many_connections_does_not_keep_out_another_that_asks_often():
    gateway, greedy, other = Gateway(), [Client("a") for _ in range(200)], Client("b")
    taken = asked = 0
    for millisecond in range(5000):
        gateway.now = millisecond * 1e-3
        if gateway.held:
            gateway.held.pop(0)
        for client in greedy:
            gateway.ask(client)
        if millisecond % 20 == 0:  # far more often than a connection's share of a 200th
            asked += 1
            taken += gateway.ask(other)
    assert taken / asked > 0.9


def test_without_overload_nobody_is_refused():
    gateway = Gateway()
    client = Client("a")
    assert all(gateway.ask(client) for _ in range(PLACES))
    assert not gateway.ask(client)


def test_a_calm_gateway_gives_all_its_places_again():
    gateway = Gateway()
    client = Client("a")
    assert not all(gateway.ask(client) for _ in range(PLACES + 1))
    gateway.held.clear()
    assert sum(gateway.ask(client) for _ in range(PLACES)) == PLACES * 3 // 4
    gateway.now += 2.1
    gateway.held.clear()
    assert all(gateway.ask(client) for _ in range(PLACES))


def test_it_finds_places_that_were_added():
    gateway = Gateway()
    client = Client("a")
    gateway.shares.refused(client, 1)  # when there was but one
    for second in range(100):
        gateway.now = float(second)
        while gateway.held:
            gateway.held.pop()
        while gateway.ask(client):
            pass
    assert len(gateway.held) > 30


def test_a_batch_beyond_the_room_left_does_not_close_the_gateway():
    gateway = Gateway()
    assert not gateway.ask(Client("a"), PLACES + 1)
    client = Client("b")
    assert sum(gateway.ask(client) for _ in range(PLACES)) >= PLACES * 3 // 4


def test_a_client_that_asked_before_the_gateway_was_ready_is_taken_as_soon_as_it_is():
    gateway, client = Gateway(), Client("a")
    for _ in range(100):  # nothing is in flight, and nobody can take the item yet
        gateway.now += 0.01
        gateway.shares.admit(client, 1)
        gateway.shares.refused(client, 1)
    for _ in range(100):
        gateway.now += 0.01
        assert gateway.ask(client)
        gateway.held.clear()


def test_an_idle_gateway_refuses_nobody():
    gateway, hasty = Gateway(), Client("a")
    gateway.held = [Client("b")]
    for _ in range(10):
        gateway.shares.refused(hasty, 1)
    assert not gateway.ask(hasty)
    gateway.held.clear()
    assert gateway.ask(hasty), "with nothing in flight there is nothing to share"
