"""Random numbers from counters: the same in any arithmetic of 32 bits, and random enough."""

import numpy as np
import torch

from evenkeel.coding.sums.counter_hash import counters, key, mix, signs, uniform

CPU = torch.device("cpu")


def mix_in_32_bits(words: "np.ndarray") -> "np.ndarray":
    """The twin in wrapping unsigned arithmetic, as kernels compute it."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    words = (words ^ (words >> np.uint32(15))) * np.uint32(0x735A2D97)
    return words ^ (words >> np.uint32(15))


def test_torch_numpy_and_plain_integers_agree() -> None:
    words = np.concatenate([np.arange(1000), 2**32 - 1 - np.arange(1000)]).astype(np.uint32)
    expected = mix_in_32_bits(words).tolist()
    assert mix(torch.tensor(words.astype(np.int64))).tolist() == expected
    assert [mix(int(word)) for word in words] == expected


def test_values_that_kernels_must_meet() -> None:
    assert (mix(1), mix(2**32 - 1)) == (2261973619, 2578835075)
    assert (key(0), key(7, 2**40, 3), key(-1)) == (3385628684, 1478361815, 2467121899)


def test_every_input_bit_changes_about_half_of_the_output_bits() -> None:
    words = counters(2000, CPU) * 2654435761 & 0xFFFFFFFF
    for bit in range(32):
        changed = mix(words) ^ mix(words ^ 1 << bit)
        share = sum(float((changed >> place & 1).float().mean()) for place in range(32)) / 32
        assert abs(share - 0.5) < 0.02, bit


def test_keys_differ_by_every_word() -> None:
    keys = {key(seed, step, bucket) for seed in range(10) for step in range(10) for bucket in range(10)}
    assert len(keys) == 1000
    assert key(1) != key(1, 0) != key(1 + 2**32, 0)


def test_uniform_numbers_are_uniform_and_neighbours_do_not_follow_each_other() -> None:
    numbers = uniform(mix(counters(2**16, CPU) + 12345))
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    counts = torch.histc(numbers, 64, 0, 1)
    chi_square = float(((counts - 1024) ** 2 / 1024).sum())
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5
    for lag in (1, 2, 32, 4096):
        correlation = float(((numbers[lag:] - 0.5) * (numbers[:-lag] - 0.5)).mean() * 12)
        assert abs(correlation) < 4 / 2**8


def test_signs_are_bits_of_words_and_half_of_them_minus() -> None:
    some = signs(70, 99, CPU)
    words = [mix(index + 99) for index in range(3)]
    assert some.tolist() == [-1.0 if words[i // 32] >> i % 32 & 1 else 1.0 for i in range(70)]
    assert abs(float(signs(2**16, 5, CPU).mean())) < 4 / 2**8
    assert signs(0, 5, CPU).shape == (0,)
