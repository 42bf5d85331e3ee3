"""What the coordinator learns: a device's raw rows, from the products that it decodes, even while it is away."""

from itertools import product

import numpy as np

from evenkeel.coding.answers.linear_codes import linear_code

DEVICES, ROWS, COLUMNS = 6, 40, 15


def test_products_of_enough_rounds_tell_the_rows_of_a_device_that_is_always_away():
    """Stochastic rounds move the weights in all directions; as many rounds as there are columns tell every number."""
    random = np.random.default_rng(0)
    data = (random.random((DEVICES, ROWS, COLUMNS)) < 0.3).astype(np.float32)
    labels = np.where(data @ random.standard_normal(COLUMNS) > 0, 1.0, -1.0)
    code = linear_code("balanced:copies=2", DEVICES)
    blocks = np.tensordot(code.rows, data, axes=1).astype(np.float32)
    away = 2
    decoder = code.decoder(code.blocks_of([device for device in range(DEVICES) if device != away]))
    weights, seen, learnt = np.zeros(COLUMNS), [], []
    known = {}
    for number in range(2 * COLUMNS):
        products = decoder.values([blocks[block] @ weights.astype(np.float32) for block in decoder.blocks])
        seen.append(weights)
        learnt.append(products[away])  # all that it takes: what the coordinator has by the protocol
        slopes = -labels / (1 + np.exp(labels * products))
        slopes[:, random.random(ROWS) < 0.7] = 0  # a mini-batch
        shares = decoder.shares(slopes).astype(np.float32)
        gradient = sum(blocks[block].T @ share for block, share in zip(decoder.blocks, shares, strict=True))
        weights = weights - 0.05 * np.asarray(gradient, np.float64)
        guess = np.linalg.lstsq(np.array(seen), np.array(learnt), rcond=1e-6)[0].T
        known[number + 1] = float((np.rint(guess) == data[away]).all(axis=1).mean())
    assert known[5] < 0.5
    assert known[2 * COLUMNS] == 1.0


def test_a_sum_of_partitions_of_zeros_and_ones_is_all_of_them():
    """So masks that leave a device the sum alone would hide nothing from it."""
    code = linear_code("balanced:copies=3", 20)
    for row in code.parity:
        factors = row[row != 0]
        bits = np.array(list(product((0, 1), repeat=len(factors))))
        sums = np.sort(bits @ factors)
        assert np.diff(sums).min() > 1e-3
