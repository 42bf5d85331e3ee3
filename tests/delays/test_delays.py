import math
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.delays.laws import (
    Constant,
    Delay,
    FleetSlowdown,
    MarkovBursts,
    Pareto,
    PersistentSlow,
    Scaled,
    ShiftedExponential,
    Trace,
    TwoMode,
    attempt_key,
)
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError

COUNT = 60_000


def draws(delay: Delay, count: int = COUNT, worker: int = 0, now_s: float = 0.0) -> np.ndarray:
    return np.array([delay.draw(key, worker, now_s) for key in range(count)])


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.txt"
    path.write_text("0.1\n0.2\n0.9\n")
    return str(path)


def every_law(trace_file: str) -> list[Delay]:
    return [
        Constant(0.1),
        TwoMode(scale=0.3, seed=7),
        PersistentSlow(slow_workers=(0, 3)),
        MarkovBursts(spell_s=2.0, seed=4),
        Pareto(seed=1),
        ShiftedExponential(1.0, 2.0, seed=2),
        Trace(trace_file, seed=3),
        FleetSlowdown(factor=3.0, from_s=5.0, to_s=8.0),
        Scaled(TwoMode(seed=5), 0.6),
    ]


# Each law against its closed form: quantiles by how many draws fall below them, within 5 standard errors.


def assert_quantiles(samples: np.ndarray, expected: dict[float, float]) -> None:
    for level, at in expected.items():
        allowed = 5 * math.sqrt(level * (1 - level) / samples.size)
        assert np.mean(samples <= at) == pytest.approx(level, abs=allowed)


def test_two_mode_has_the_measured_quantiles():
    samples = draws(TwoMode())
    body, slow = NormalDist(-1.977, 0.222), NormalDist(0.701, 0.054)
    known = {}
    for at in (0.1, 0.14, 0.2, 0.3, 0.65, 0.702, 0.77):
        known[0.979 * body.cdf(math.log(at)) + 0.021 * slow.cdf(at)] = at
    assert_quantiles(samples, known)
    # The data that the constants were fitted to: p50 .138, p95 .215, p99 .702, sd .0865 seconds.
    assert np.quantile(samples, [0.5, 0.95, 0.99, 0.999]) == pytest.approx([0.139, 0.212, 0.702, 0.790], abs=0.02)
    assert samples.mean() == pytest.approx(TwoMode().mean_s, abs=5 * samples.std() / math.sqrt(COUNT))
    assert samples.std() == pytest.approx(0.0865, rel=0.05)


def test_two_mode_slow_mode_is_cut_off_at_zero():
    law = TwoMode(slow_share=1.0, slow_mean_s=0.1, slow_sd_s=0.2)
    samples = draws(law, 20_000)
    assert samples.min() > 0
    normal = NormalDist(0.1, 0.2)
    cut = normal.cdf(0)
    assert_quantiles(samples, {(normal.cdf(at) - cut) / (1 - cut): at for at in (0.05, 0.2, 0.5)})
    assert samples.mean() == pytest.approx(law.mean_s, rel=0.02)


def test_pareto_has_its_tail():
    samples = draws(Pareto(1.5, 0.1))
    assert samples.min() >= 0.1
    assert_quantiles(samples, {1 - (0.1 / at) ** 1.5: at for at in (0.15, 0.5, 2.15, 10.0)})
    assert Pareto(1.5, 0.1).mean_s == pytest.approx(0.3)


def test_shifted_exponential_has_its_moments():
    law = ShiftedExponential(shift_s=1.0, rate_per_s=2.0)
    samples = draws(law)
    assert samples.min() >= 1.0
    assert_quantiles(samples, {1 - math.exp(-2 * (at - 1)): at for at in (1.1, 1.5, 3.0)})
    assert samples.mean() == pytest.approx(law.mean_s, abs=5 * 0.5 / math.sqrt(COUNT))


def test_a_persistent_slow_worker_is_the_same_draw_longer():
    law = PersistentSlow()
    quick, slow = draws(law, 100, worker=1), draws(law, 100, worker=0)
    assert slow == pytest.approx(5.1 * quick)
    assert [worker for worker in range(120) if law.draw(1, worker, 0.0) > 3 * law.draw(1, 1, 0.0)] == [0, 50, 100]
    chosen = PersistentSlow(slow_workers=(2, 5))
    assert [worker for worker in range(60) if chosen.draw(1, worker, 0.0) > law.draw(1, 1, 0.0)] == [2, 5]
    assert quick.max() < 0.4, "the default inner law has no slow mode of its own"


def test_bursts_have_their_duty_and_spell_length():
    law = MarkovBursts(spell_s=3.0, duty=0.02, seed=3)
    step_s, count = 0.5, 20_000
    duties, spells = [], []
    for worker in range(8):
        slow = np.array([law.is_slow(worker, place * step_s) for place in range(count)])
        duties.append(slow.mean())
        begins = np.flatnonzero(np.diff(slow.astype(int)) == 1)
        ends = np.flatnonzero(np.diff(slow.astype(int)) == -1)
        ends = ends[ends > begins[0]]
        spells += list((ends - begins[: ends.size]) * step_s)
    # 80,000 s hold about 530 spells: the duty's standard error is 6 % of it, the mean spell's 4 %.
    assert np.mean(duties) == pytest.approx(0.02, rel=0.25)
    assert np.mean(spells) == pytest.approx(3.0, rel=0.2)
    assert len(set(duties)) == 8, "each worker has spells of its own"
    assert law.mean_s == pytest.approx(law.inner.mean_s * 1.082)


def test_bursts_stretch_the_inner_draw_by_the_factor():
    law = MarkovBursts(spell_s=1.0, duty=0.5, seed=1)
    times = [place / 4 for place in range(400)]
    ratios = {round(law.draw(5, 0, now_s) / law.inner.draw(5, 0, now_s), 9) for now_s in times}
    assert ratios == {1.0, 5.1}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=30))
def test_bursts_do_not_depend_on_the_order_of_questions(times):
    asked, again = MarkovBursts(seed=9), MarkovBursts(seed=9)
    assert {t: asked.is_slow(2, t) for t in times} == {t: again.is_slow(2, t) for t in sorted(times, reverse=True)}


def test_a_fleet_slowdown_has_a_window():
    law = FleetSlowdown(Constant(0.1), factor=3.0, from_s=5.0, to_s=8.0)
    assert [law.draw(0, 0, now_s) for now_s in (4.99, 5.0, 7.99, 8.0)] == pytest.approx([0.1, 0.3, 0.3, 0.1])


def test_a_scaled_law_is_the_inner_draw_times_the_factor():
    assert draws(Scaled(TwoMode(seed=1), 0.6), 50) == pytest.approx(0.6 * draws(TwoMode(seed=1), 50))


def test_a_trace_gives_its_values_and_no_others(trace_file):
    shuffled = draws(Trace(trace_file), 9_000)
    values, counts = np.unique(shuffled, return_counts=True)
    assert list(values) == [0.1, 0.2, 0.9]
    assert counts == pytest.approx([3000, 3000, 3000], abs=250)
    in_turn = Trace(trace_file, order="in-turn", scale=10.0)
    assert [in_turn.draw(key, 0, 0.0) for key in range(5)] == pytest.approx([1, 2, 9, 1, 2])
    assert Trace(trace_file).mean_s == pytest.approx(0.4)


def test_a_trace_may_be_an_array_file(tmp_path):
    np.save(tmp_path / "one.npy", [[0.5, 0.25]])
    np.savez(tmp_path / "one.npz", seconds=[0.5])
    np.savez(tmp_path / "two.npz", a=[0.5], b=[0.1])
    assert Trace(str(tmp_path / "one.npy"), order="in-turn").draw(1, 0, 0.0) == 0.25
    assert Trace(str(tmp_path / "one.npz")).draw(1, 0, 0.0) == 0.5
    with pytest.raises(ConfigurationError, match="one array, found a, b"):
        Trace(str(tmp_path / "two.npz"))


def test_a_trace_never_unpickles(tmp_path):
    path = tmp_path / "objects.npy"
    np.save(path, np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigurationError, match="seconds"):
        Trace(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("0.1\n-0.2\n", "seconds from 0"),
        ("0.1\nnan\n", "seconds from 0"),
        ("138000\n", "another unit"),
        ("0.1\nlate\n", "one number of seconds a line"),
    ],
)
def test_a_wrong_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        Trace(str(path))


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot be read: No such file"):
        Trace(str(tmp_path / "none.txt"))


# Common random numbers.


def test_draws_depend_on_nothing_but_their_arguments(trace_file):
    for law, again in zip(every_law(trace_file), every_law(trace_file), strict=True):
        asked = [(key, worker, now_s) for key in (0, 1, 2**40) for worker in (0, 3) for now_s in (0.0, 6.0)]
        first = [law.draw(*each) for each in asked]
        assert first == [again.draw(*each) for each in reversed(asked)][::-1]
        assert all(value >= 0 for value in first)


def test_draws_are_the_same_in_another_process():
    code = "from evenkeel.delays.laws import *; print(TwoMode(seed=7).draw(11, 0, 0.0), Pareto(seed=2).draw(5, 1, 0.0))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(TwoMode(seed=7).draw(11, 0, 0.0)), str(Pareto(seed=2).draw(5, 1, 0.0))]


@pytest.mark.parametrize("law", [TwoMode, Pareto, ShiftedExponential])
def test_independent_laws_know_only_the_key(law):
    assert law().draw(3, 0, 0.0) == law().draw(3, 8, 99.0)


def test_seeds_and_neighbouring_keys_and_attempts_are_uncorrelated():
    keys = range(20_000)
    law = TwoMode(slow_share=0.0)
    first = np.log(draws(law, 20_001))
    other = np.log(draws(TwoMode(slow_share=0.0, seed=1), 20_000))
    hedge = np.log([law.draw(attempt_key(key, 1), 0, 0.0) for key in keys])
    third = np.log([law.draw(attempt_key(key, 2), 0, 0.0) for key in keys])
    for left, right in ((first[:-1], first[1:]), (first[:-1], other), (first[:-1], hedge), (hedge, third)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(20_000)


def test_the_first_attempt_is_the_piece_of_work_itself():
    assert attempt_key(12, 0) == 12
    assert len({attempt_key(key, attempt) for key in range(50) for attempt in range(5)}) == 250


# As text.


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("none", Constant(0.0)),
        ("constant:seconds=100ms", Constant(0.1)),
        ("two-mode", TwoMode()),
        ("two-mode:scale=0.3,seed=7", TwoMode(scale=0.3, seed=7)),
        ("two-mode:slow-share=.1,slow-mean=1s,slow-sd=10ms", TwoMode(slow_share=0.1, slow_mean_s=1.0, slow_sd_s=0.01)),
        (
            "persistent:slow=0+3,factor=5.1,scale=.3",
            PersistentSlow(TwoMode(scale=0.3, slow_share=0.0), 5.1, slow_workers=(0, 3)),
        ),
        ("persistent/pareto:shape=2", PersistentSlow(Pareto(2.0))),
        ("markov:spell=3", MarkovBursts(spell_s=3.0)),
        ("markov:spell=10s,seed=2", MarkovBursts(TwoMode(slow_share=0.0, seed=2), spell_s=10.0, seed=2)),
        ("pareto:shape=1.5,scale=100ms", Pareto()),
        ("shifted-exponential:shift=1,rate=2", ShiftedExponential(1.0, 2.0)),
        ("fleet:factor=3,from=5,to=8", FleetSlowdown(TwoMode(), 3.0, 5.0, 8.0)),
        ("fleet:to=2/markov/constant:seconds=1", FleetSlowdown(MarkovBursts(Constant(1.0)), to_s=2.0)),
        ("scaled:factor=.6/two-mode:seed=3", Scaled(TwoMode(seed=3), 0.6)),
    ],
)
def test_a_text_names_a_law(text, law):
    assert parse_delay(text) == law


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not of the form"),
        ("two-mode:", "is not of the form"),
        ("two-mode:scale", "'scale' is not of the form field=value"),
        ("two-mode:scale=1,scale=2", "'scale' is given twice"),
        ("gaussian", "delay 'gaussian' is unknown; allowed are none, constant, two-mode, persistent"),
        ("two-mode:speed=2", "field 'speed' is unknown; allowed are scale, slow-share, mu"),
        ("markov:shape=2", "field 'shape' is unknown; allowed are spell, duty"),
        ("two-mode:scale=fast", "field 'scale' must be a number, found 'fast'"),
        ("two-mode:scale=inf", "field 'scale' must be a number"),
        ("two-mode:scale=0", "field 'scale' must be above zero"),
        ("two-mode:slow-share=2", "field 'slow-share' must be from 0 to 1"),
        ("two-mode:seed=1.5", "field 'seed' must be a whole number"),
        ("constant:seconds=2h", "must be a time such as"),
        ("constant:seconds=-1", "must not be negative"),
        ("persistent:slow=a", "field 'slow' must be a whole number"),
        ("pareto:shape=1", "the mean is infinite"),
        ("markov:duty=1", "between 0 and 1"),
        ("fleet:from=3,to=2", "later than from"),
        ("trace", "field 'path' is missing"),
        ("trace:path=x,order=random", "must be shuffled or in-turn"),
        ("persistent:scale=2/pareto", "field 'scale' is unknown; allowed are factor, slow"),
        ("none:seconds=1", "delay 'none' is unknown"),
    ],
)
def test_a_wrong_text_is_refused_with_the_field(text, message):
    with pytest.raises(ConfigurationError) as caught:
        parse_delay(text)
    assert message in str(caught.value)
