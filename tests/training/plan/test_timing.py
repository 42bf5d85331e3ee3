"""The step-time formulas: by hand, against a segment-by-segment simulation, and in their limits."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.training.hook.stats import break_even_bps
from evenkeel.training.plan.advice import recommend
from evenkeel.training.plan.code_costs import bf16, gradiveq, low_rank, power_sgd, thc
from evenkeel.training.plan.timing import (
    SCHEDULES,
    CodeCost,
    NetworkLink,
    Step,
    comm_s,
    ddp_segments,
    fp32,
    predict,
    server_comm_s,
    step_s,
)

RESNET18 = 11_700_000
MATRICES = [(512, 4608)] * 4


def link_of(rate_bps, **options):
    return NetworkLink(**{"alpha_s": 0.0, "beta_s_per_byte": 8 / rate_bps, **options})


def test_ring_by_hand():
    # 4 workers, 1000 bytes: 6 messages of 1 ms, 1.5 x 1000 bytes of 2 us, 750 bytes added at 1 us, one meeting of 5 ms.
    cost = CodeCost("c", 1000.0, 1000.0, 1000.0)
    link = NetworkLink(alpha_s=1e-3, beta_s_per_byte=2e-6, gamma_s_per_byte=1e-6, sync_s=5e-3)
    assert comm_s(link, 4, cost) == pytest.approx(6e-3 + 3e-3 + 0.75e-3 + 5e-3)
    # In 3 segments only messages and meetings are paid again.
    assert comm_s(link, 4, cost, segments=3) == pytest.approx(3 * (6e-3 + 5e-3) + 3e-3 + 0.75e-3)
    assert comm_s(link, 4, replace(cost, collectives=2)) == pytest.approx(2 * (6e-3 + 5e-3) + 3e-3 + 0.75e-3)


def test_server_by_hand():
    # Its link carries 4 x 1000 bytes in and 4 x 500 out at 2 us, and it adds three contributions to the first.
    cost = CodeCost("c", 1000.0, 500.0, 1000.0)
    link = NetworkLink(alpha_s=1e-3, beta_s_per_byte=2e-6, gamma_s_per_byte=1e-6, sync_s=5e-3)
    assert server_comm_s(link, 4, cost) == pytest.approx(2e-3 + 12e-3 + 3e-3 + 5e-3)


def test_schedules_by_hand():
    # Communication 40 ms in all; 4 segments are 10 ms each.
    link = NetworkLink(alpha_s=0.0, beta_s_per_byte=40e-6)
    cost = CodeCost("c", 1000.0, 1000.0, 0.0, encode_s=4e-3, decode_s=2e-3)
    step = Step(forward_s=10e-3, backward_s=20e-3, update_s=1e-3, parameters=250, segments=4)
    assert step_s(link, 2, step, cost, "synchronous") == pytest.approx(77e-3)
    assert step_s(link, 2, step, cost, "parameter server") == pytest.approx(37e-3 + 160e-3)
    # Backward and encoding end a segment every 6 ms: the first leaves at 6, the four travel until 46.
    assert step_s(link, 2, step, cost, "layer-wise") == pytest.approx(1e-3 + 10e-3 + 46e-3 + 2e-3)
    assert step_s(link, 2, step, cost, "pipelined") == pytest.approx(46e-3)
    # Ten times faster: then the last segment ends the backward pass at 24 and travels for 1 more.
    fast = NetworkLink(alpha_s=0.0, beta_s_per_byte=4e-6)
    assert step_s(fast, 2, step, cost, "layer-wise") == pytest.approx(1e-3 + 10e-3 + 25e-3 + 2e-3)
    assert step_s(fast, 2, step, cost, "pipelined") == pytest.approx(37e-3)


def test_wire_of_resnet18_on_four_workers():
    # Per rank and step: 70.2 MB with fp32, .56 s at 1 Gbit/s; half with bf16; 7-bit sums and 4-bit indices 12.1 MB.
    assert fp32(RESNET18).sent_bytes(4) == pytest.approx(70.2e6)
    assert comm_s(link_of(1e9), 4, fp32(RESNET18)) == pytest.approx(0.5616)
    assert bf16(RESNET18).sent_bytes(4) == pytest.approx(35.1e6)
    assert thc(RESNET18, 4).sent_bytes(4) * 8 / RESNET18 == pytest.approx(0.75 * (4 + 7 + 2 * 32 / 4096))


@pytest.mark.parametrize(
    ("workers", "bits", "granularity", "sum_bits"), [(4, 4, 17, 7), (8, 4, 17, 8), (2, 4, 15, 5), (255, 1, 1, 8)]
)
def test_sums_have_as_many_bits_as_their_largest_value(workers, bits, granularity, sum_bits):
    cost = thc(4096 * 8, workers, bits, granularity)
    assert sum_bits == math.ceil(math.log2(granularity * workers + 1))
    assert cost.down_bytes == 4096 * sum_bits + 8 * 4
    assert cost.up_bytes == 4096 * bits + 8 * 4


def test_power_sgd_by_hand():
    # One 512 x 4608 matrix: 5120 numbers for each rank; all other parameters as they are.
    cost = power_sgd(2_400_000, [(512, 4608)], rank=4)
    assert cost.up_bytes == 4 * (4 * 5120 + 2_400_000 - 512 * 4608)
    assert cost.collectives == 2
    # A bias seen as a matrix would not shrink, so it stays.
    assert power_sgd(512, [(512, 1)]).up_bytes == 4 * 512
    assert power_sgd(512, [(512, 1)]).encode_s == 0


def test_gradiveq_by_hand():
    assert gradiveq(1000, convolutions=800, ratio=8).up_bytes == 4 * (100 + 200)


def test_low_rank_by_hand():
    # 4 directions of 512 x 4608 are 4 * 5120 / 2 numbers a step; the matrix of 4 rows has as many and stays as it is.
    cost = low_rank(2_400_000, 4, [(512, 4608), (4, 1000)], rank=4)
    numbers = 2 * 5120 + 2_400_000 - 512 * 4608
    assert cost.up_bytes == pytest.approx(numbers * (4 + 32 / 512) / 8)
    assert cost.down_bytes == pytest.approx(numbers * (7 + 32 / 512) / 8)
    assert cost.pipelines


def test_segments_are_the_buckets_of_ddp():
    assert ddp_segments(1) == ddp_segments(2**18) == 1
    assert ddp_segments(2**18 + 1) == 2
    assert ddp_segments(RESNET18) == 3


def simulated(link, workers, step, cost):
    """Layer-wise training, segment by segment."""
    ready = link_free = step.update_s + step.forward_s
    each = comm_s(link, workers, cost, step.segments) / step.segments
    for _ in range(step.segments):
        ready += (step.backward_s + cost.encode_s) / step.segments
        link_free = max(link_free, ready) + each
    return link_free + cost.decode_s


times = st.floats(0, 2)
links = st.builds(NetworkLink, st.floats(0, 1e-2), st.floats(1e-12, 1e-5), st.floats(0, 1e-8), st.floats(0, 1e-2))
steps = st.builds(Step, times, times, st.integers(1, 10**7), times, st.integers(1, 40))


def codes_of(step, workers):
    return [
        fp32(step.parameters),
        bf16(step.parameters),
        thc(step.parameters, workers),
        gradiveq(step.parameters, step.parameters // 2),
        low_rank(step.parameters, workers, []),
        power_sgd(step.parameters, []),
    ]


@given(links, st.integers(2, 64), steps)
def test_layer_wise_equals_its_simulation(link, workers, step):
    for cost in codes_of(step, workers):
        assert step_s(link, workers, step, cost, "layer-wise") == pytest.approx(simulated(link, workers, step, cost))


@given(links, st.integers(2, 64), steps, st.sampled_from(SCHEDULES), st.floats(1, 10))
def test_a_worse_link_or_more_work_never_helps(link, workers, step, schedule, factor):
    for cost in codes_of(step, workers):
        now = step_s(link, workers, step, cost, schedule)
        for name in ("alpha_s", "beta_s_per_byte", "gamma_s_per_byte", "sync_s"):
            worse = replace(link, **{name: getattr(link, name) * factor})
            assert step_s(worse, workers, step, cost, schedule) >= now * (1 - 1e-12)
        for name in ("forward_s", "backward_s", "update_s"):
            longer = replace(step, **{name: getattr(step, name) * factor})
            assert step_s(link, workers, longer, cost, schedule) >= now * (1 - 1e-12)
        assert step_s(link, workers + 1, step, cost, schedule) >= now * (1 - 1e-12)


@given(links, st.integers(2, 64), steps)
def test_hiding_communication_never_costs_time(link, workers, step):
    """In one segment: nothing is hidden layer-wise, and pipelined steps are no longer than synchronous ones."""
    step = replace(step, segments=1)
    for cost in codes_of(step, workers):
        synchronous = step_s(link, workers, step, cost, "synchronous")
        assert step_s(link, workers, step, cost, "layer-wise") == pytest.approx(synchronous)
        pipelined = step_s(link, workers, step, cost, "pipelined")
        compute = step.compute_s + cost.encode_s + cost.decode_s
        assert compute <= pipelined <= synchronous * (1 + 1e-12)
        assert pipelined >= synchronous / 2 * (1 - 1e-12)  # hiding at best halves


def test_limits():
    step = Step(forward_s=0.01, backward_s=0.02, parameters=RESNET18, segments=3)
    plain, half = fp32(RESNET18), bf16(RESNET18, 0, 0)
    # Communication alone counts: pipelining gains nothing, half the bytes twice the speed.
    slow = link_of(1e3)
    times = {schedule: step_s(slow, 4, step, plain, schedule) for schedule in SCHEDULES}
    assert times["layer-wise"] == pytest.approx(times["pipelined"], rel=1e-3)
    assert times["layer-wise"] / step_s(slow, 4, step, half, "layer-wise") == pytest.approx(2, rel=1e-3)
    assert times["parameter server"] / times["synchronous"] == pytest.approx(4 * 4 / 3, rel=1e-3)  # p against (p-1)/p
    # Computation alone counts: all are alike.
    fast = link_of(1e15)
    for schedule in SCHEDULES:
        assert step_s(fast, 4, step, plain, schedule) == pytest.approx(step.compute_s, rel=1e-3)


def test_the_most_that_pipelining_alone_gains_over_ddp():
    """With backward twice as long as forward and all hidden, 1 + l_for / l_comp = 4/3, at l_comm = l_comp."""
    step = Step(forward_s=0.1, backward_s=0.2, parameters=10**6, segments=1000)
    link = NetworkLink(alpha_s=0.0, beta_s_per_byte=0.3 / fp32(10**6).sent_bytes(4))
    rows = {(row.code, row.schedule): row for row in predict(link, 4, step, [])}
    assert rows["fp32", "pipelined"].speedup == pytest.approx(4 / 3, rel=1e-3)


@pytest.mark.parametrize("rate_bps", [1e8, 1e9, 1e11])
def test_predictions_stand_beside_plain_ddp(rate_bps):
    step = Step(forward_s=0.03, backward_s=0.06, parameters=RESNET18, segments=3)
    codes = [bf16(RESNET18), thc(RESNET18, 4)]
    rows = predict(link_of(rate_bps, alpha_s=1e-4), 4, step, codes)
    assert [(row.code, row.schedule) for row in rows] == [
        (code, schedule) for code in ("fp32", "bf16", "thc:bits=4") for schedule in SCHEDULES
    ]
    plain = next(row for row in rows if row.is_plain)
    assert plain.speedup == 1
    for row in rows:
        assert row.speedup == pytest.approx(plain.step_s / row.step_s)
        assert row.wait_s == pytest.approx(row.step_s - 0.09)
        # Below the break-even rate it gains, above it does not.
        assert (row.step_s <= plain.step_s * (1 + 1e-9)) == (rate_bps <= row.break_even_bps)


@settings(max_examples=20)
@given(st.floats(0.001, 0.1), st.floats(0.1, 20), st.integers(2, 16))
def test_break_even_of_synchronous_steps_is_the_closed_form(forward_s, encode_ns, workers):
    """One segment, and no cost but bytes: the saved bytes take as long as encoding and decoding."""
    step = Step(forward_s=forward_s, backward_s=0.05, parameters=10**6, segments=1)
    code = bf16(10**6, encode_ns, encode_ns / 2)
    rows = predict(link_of(1e9), workers, step, [code])
    row = next(row for row in rows if (row.code, row.schedule) == ("bf16", "layer-wise"))
    saved = fp32(10**6).sent_bytes(workers) - code.sent_bytes(workers)
    assert row.break_even_bps == pytest.approx(break_even_bps(saved, code.encode_s + code.decode_s), rel=1e-6)


def test_break_even_at_its_ends():
    assert break_even_bps(1000, 4e-3) == 8000 / 4e-3
    assert break_even_bps(0, 2e-3) == break_even_bps(-5, 0) == 0
    assert break_even_bps(1000, 0) == math.inf
    step = Step(forward_s=0.01, backward_s=0.02, parameters=1000)
    larger = replace(bf16(1000), name="larger", up_bytes=8000.0, down_bytes=8000.0)
    rows = {(row.code, row.schedule): row for row in predict(link_of(1e6), 4, step, [larger])}
    assert rows["larger", "synchronous"].break_even_bps == 0
    assert rows["fp32", "pipelined"].break_even_bps == math.inf


def advised(rate_bps, backward_s=0.06, **options):
    step = Step(forward_s=backward_s / 2, backward_s=backward_s, parameters=RESNET18, segments=3)
    codes = [bf16(RESNET18), thc(RESNET18, 4), power_sgd(RESNET18, MATRICES)]
    return recommend(predict(link_of(rate_bps, alpha_s=5e-5, **options), 4, step, codes))


def slow_rows():
    step = Step(forward_s=0.03, backward_s=0.06, parameters=RESNET18, segments=3)
    return predict(link_of(1e8), 4, step, [bf16(RESNET18), thc(RESNET18, 4)])


def test_advice_on_a_fast_link_is_to_do_nothing():
    advice = advised(1e12)
    assert advice.prediction.is_plain
    assert advice.sentence.startswith("Do nothing: plain DDP takes 90")
    assert "waits 0% of it for the network" in advice.sentence or "waits 1% of it for the network" in advice.sentence


def test_advice_on_a_slow_link_is_a_code():
    advice = advised(1e8)
    assert advice.prediction.code == "thc:bits=4"
    assert advice.prediction.speedup > 3
    assert advice.sentence.startswith("Use thc:bits=4")
    assert "waits 98% of it for the network" in advice.sentence
    assert "On links above" in advice.sentence


@pytest.mark.parametrize(
    ("bf16_s", "thc_s", "chosen"),
    [(1.05, 1.0, "bf16"), (1.2, 1.0, "thc:bits=4"), (2.1, 1.9, "fp32"), (2.1, 2.2, "fp32")],
)
def test_advice_takes_the_least_invasive_of_those_that_are_about_as_fast(bf16_s, thc_s, chosen):
    rows = [row for row in slow_rows() if row.schedule == "layer-wise"]
    seconds = {"fp32": 2.0, "bf16": bf16_s, "thc:bits=4": thc_s}
    rows = [replace(row, step_s=seconds[row.code], speedup=2 / seconds[row.code]) for row in rows]
    advice = recommend(rows)
    assert advice.prediction.code == chosen
    assert ("would gain 5%" in advice.sentence) == (thc_s == 1.9)
    assert ("nothing here is faster" in advice.sentence) == (thc_s == 2.2)


@pytest.mark.parametrize("schedule", ["parameter server", "synchronous"])
def test_advice_is_only_what_can_be_had(schedule):
    rows = [replace(row, step_s=0.0) if row.schedule == schedule else row for row in slow_rows()]
    assert recommend(rows).prediction.schedule in ("layer-wise", "pipelined")


def test_torchs_own_hooks_are_not_pipelined():
    step = Step(forward_s=0.03, backward_s=0.06, parameters=RESNET18, segments=3)
    rows = predict(link_of(1e8), 4, step, [power_sgd(RESNET18, [(4680, 2500)])])
    fastest = min(rows, key=lambda row: row.step_s)
    assert (fastest.code, fastest.schedule) == ("powersgd:rank=1", "pipelined")
    assert not fastest.available
    chosen = recommend(rows).prediction
    assert (chosen.code, chosen.schedule) == ("powersgd:rank=1", "layer-wise")


def test_advice_to_pipeline_warns_of_stale_gradients():
    step = Step(forward_s=0.1, backward_s=0.2, parameters=10**6, segments=1)
    link = NetworkLink(alpha_s=0.0, beta_s_per_byte=0.28 / fp32(10**6).sent_bytes(4))
    advice = recommend(predict(link, 4, step, []))
    assert (advice.prediction.code, advice.prediction.schedule) == ("fp32", "pipelined")
    assert "gradient of the step before" in advice.sentence
    assert "would lose" not in advice.sentence  # it never does


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NetworkLink(-1e-3, 1e-9), "alpha_s"),
        (lambda: NetworkLink(0, math.nan), "beta_s_per_byte"),
        (lambda: NetworkLink(0, 0, sync_s=math.inf), "sync_s"),
        (lambda: Step(1, -1, 10), "backward_s"),
        (lambda: Step(1, 1, 0), "parameters"),
        (lambda: Step(1, 1, 10, segments=0), "segments"),
        (lambda: thc(10, 4, bits=9), "bits"),
        (lambda: gradiveq(10, 11), "convolutions"),
        (lambda: gradiveq(10, 10, ratio=0.5), "ratio"),
        (lambda: power_sgd(10, [], rank=0), "rank"),
        (lambda: power_sgd(10, [(4, 4)]), "matrices"),
        (lambda: bf16(10, encode_ns=-1), "encode_ns"),
        (lambda: predict(NetworkLink(0, 0), 1, Step(1, 1, 10), []), "workers"),
    ],
)
def test_wrong_numbers_are_refused_by_name(make, name):
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        make()
