"""Hedges as a share of the load."""

import numpy as np
from hypothesis import given, strategies as st

from evenkeel.serving.gateway.budget import Budget, Rationed
from evenkeel.serving.gateway.item import Item


@given(st.floats(0, 1), st.lists(st.booleans(), max_size=300))
def test_no_more_is_spent_than_a_token_and_the_share_of_what_came(share, script):
    budget = Budget(share)
    items = spent = 0
    for comes in script:
        if comes:
            budget.earn()
            items += 1
        else:
            spent += budget.spend()
    assert spent <= (1 if share > 0 else 0) + share * items + 1e-9


def test_the_first_hedge_need_not_be_earned():
    budget = Budget(0.05)
    assert budget.spend()
    assert not budget.spend()


def test_a_twentieth_earns_a_hedge_every_twenty_items():
    budget = Budget(0.05)
    budget.spend()
    spent = 0
    for _ in range(2000):
        budget.earn()
        spent += budget.spend()
    assert 99 <= spent <= 100


def test_a_quiet_hour_saves_up_no_more_than_the_burst():
    budget = Budget(0.5, burst=3.0)
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]


def test_without_a_share_nothing_is_ever_hedged_and_without_a_limit_everything_is():
    nothing, everything = Budget(0.0), Budget(float("inf"))
    for _ in range(100):
        nothing.earn()
        everything.earn()
    assert not nothing.spend()
    assert all(everything.spend() for _ in range(1000))


def item(number):
    return Item(number, np.zeros(1), lambda outcome: None, number, 0.0)


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_tokens_go_to_those_that_gain_most_of_all_that_still_wait(order, answered):
    used = []
    rationed = Rationed(Budget(0.5), lambda one: 1.0 + order.index(one.number), lambda one: used.append(one.number))
    items = [item(number) for number in range(12)]
    assert rationed.spend(item(99))  # the one that need not be earned
    for one in items:
        assert not rationed.spend(one)
    for number in answered:
        rationed.forget(items[number])
    for _ in range(24):
        rationed.earn()
    assert used == [number for number in reversed(order) if number not in answered]


def test_a_token_is_kept_for_later_where_nobody_gains_by_it():
    gains = {0: 0.0, 1: -1.0}
    used = []
    rationed = Rationed(Budget(1.0), lambda one: gains[one.number], lambda one: used.append(one.number))
    assert rationed.spend(item(9))
    assert not rationed.spend(item(0))
    assert not rationed.spend(item(1))
    rationed.earn()
    assert used == []
    gains[1] = 0.1
    rationed.earn()
    assert used == [1]
    assert rationed.spend(item(2))
