"""`evenkeel bench codes`: errors and bits of codes and peers against what theory and a pencil say."""

import importlib.util
import json
import subprocess
import sys
from math import log2, pi
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from evenkeel.bench.codes import peers
from evenkeel.bench.codes.lloyd_max import lloyd_max
from evenkeel.bench.codes.measure import (
    DEFAULT_CODES,
    made_setting,
    measure,
    parse_code,
    recorded_settings,
)
from evenkeel.bench.codes.recorded import Moment, Recorded, read_gradients, write_gradients
from evenkeel.bench.codes.traffic import gathered, ring, sharded
from evenkeel.bench.codes.vectors import LAWS, Gradients, correlation_of, made
from evenkeel.cli.main import main
from evenkeel.errors import ConfigurationError

FIXED = ["code", "workers", "correlation", "distribution", "bits_per_coordinate", "nmse"]
LENGTH = 8192
SHAPES = ((8, 16), (8,), (16, 8, 3, 3))


def one(code: str, workers: int = 1, correlation: float = 0.0, law: str = "gaussian", length: int = LENGTH) -> dict:
    (row,) = measure([parse_code(code)], [made_setting(law, workers, correlation, length)], seeds=2)
    return row


def of(vectors: "torch.Tensor", *shapes: tuple[int, ...]) -> Gradients:
    return Gradients(vectors, shapes, vectors[:0])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "codes", *map(str, arguments)])


def recording(path: Path, workers: int = 3) -> Path:
    random = np.random.default_rng(0)
    length = 8 * 16 + 8 + 16 * 8 * 9
    outer = random.normal(size=(workers + 5, 16, 1)) * random.normal(size=(1, 1, 72))
    common = np.concatenate([random.normal(size=(workers + 5, 136)), outer.reshape(-1, 1152)], axis=1)
    rows = common.astype(np.float32)
    assert rows.shape[1] == length
    moments = {"early": Moment(rows[:workers], rows[workers:]), "late": Moment(rows[:workers], rows[:0])}
    write_gradients(path, Recorded("tiny", ("a.weight", "a.bias", "conv.weight"), SHAPES, moments))
    return path


# --- vectors


@pytest.mark.parametrize("law", [law for law in LAWS if law != "low-rank"])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_made_vectors_have_the_correlation_that_was_asked_for(law: str, correlation: float) -> None:
    found = [correlation_of(made(law, 4, 1 << 16, correlation, seed).vectors) for seed in range(3)]
    # Few coordinates of the lognormal and of the sparse law count.
    assert np.mean(found) == pytest.approx(correlation, abs=0.07)


def test_correlation_of_vectors_that_are_known() -> None:
    assert correlation_of(torch.eye(3)) == pytest.approx(0)
    assert correlation_of(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) == pytest.approx(1)
    assert correlation_of(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(0.5**0.5)
    assert correlation_of(torch.ones(1, 4)) is None


def test_laws_make_what_they_say() -> None:
    sparse = made("sparse", 2, LENGTH, 0.0, 0).vectors[0].view(-1, 64)
    assert int((sparse != 0).any(1).sum()) == 2  # 1 % of 128 rows, rounded up
    assert sparse[(sparse != 0).any(1)].count_nonzero() == 128
    spikes = made("one-hot", 1, LENGTH, 0.0, 0).vectors[0].abs().view(-1, 1024)
    assert spikes.amax(1).tolist() == [1.0] * 8
    assert float(spikes.sort(1).values[:, -2].max()) < 0.01
    lognormal = made("lognormal-2", 1, LENGTH, 0.0, 0)
    assert lognormal.shapes == ((3000,), (3000,), (2192,))
    sizes = [float(layer.std()) for layer in lognormal.vectors[0].split([3000, 3000, 2192])]
    assert max(sizes) > 2 * min(sizes)
    low = made("low-rank", 2, LENGTH, 0.0, 0)
    assert low.shapes == ((28, 28, 3, 3), (LENGTH - 28 * 28 * 9,))
    energies = torch.linalg.svdvals(low.vectors[0][: 28 * 28 * 9].view(28, -1)).square()
    assert float(energies[:16].sum() / energies.sum()) > 0.98
    again = made("low-rank", 2, LENGTH, 0.0, 0)
    assert torch.equal(low.vectors, again.vectors)
    assert torch.equal(low.earlier, again.earlier)
    assert not torch.equal(low.vectors, made("low-rank", 2, LENGTH, 0.0, 1).vectors)


# --- bits, by hand


def test_bits_of_each_topology() -> None:
    assert ring(4, 32).bits == 48  # fp32, as everyone says it
    assert sharded(4, 4, 7).bits == 8.25
    assert sharded(4, 4000, 7000, scales=2).bits == 8250 + 2 * 0.75 * 64
    assert gathered(4, 4, 1) == type(ring(4, 1))("all-gather", 12)
    assert gathered(16, 4000, 1000).topology == "fp32 down"  # 15/16 (4 + 32) is less than 15 * 4
    assert gathered(16, 4000, 1000).bits == 15 / 16 * 36000
    for alone in (ring(1, 7), gathered(1, 7, 1), sharded(1, 3, 9, scales=0)):
        assert alone.topology == "one message"
    assert sharded(1, 3, 9, scales=2).bits == 3 + 64


@pytest.mark.parametrize(
    ("code", "workers", "bits"),
    [
        ("fp32", 4, 48),
        ("bf16", 4, 24),
        ("fp32", 1, 32),
        ("fp8", 4, 0.75 * 2 * (8 + 32 / 128)),
        ("thc:bits=4", 4, 0.75 * (4 + 7) + 2 * 0.75 * 32 / 4096),  # 4 * 17 = 68 takes 7 bits
        ("thc:bits=4", 8, 7 / 8 * (4 + 8) + 2 * 7 / 8 * 32 / 4096),
        ("thc:bits=4", 1, 4 + 32 / 4096),
        ("fixed:bits=8,block=1024", 2, 0.5 * (8 + 9) + 2 * 0.5 * 32 / 1024),  # 2 * 254 = 508
        ("thc-public", 4, 0.75 * (4 + 8) + 2 * 0.75 * 32 / LENGTH),
        ("thc-public", 16, 15 / 16 * (4 + 16) + 2 * 15 / 16 * 32 / LENGTH),  # 16 * 30 is more than a byte
        ("qsgd:levels=7", 3, 2 * (4 + 32 / 512)),
        ("qsgd:levels=1", 2, 2 + 32 / 512),
        ("terngrad", 2, 2 + 32 / LENGTH),
        ("terngrad:scale=shared", 4, 0.75 * (2 + 4) + 2 * 0.75 * 32 / LENGTH),  # sums 0..8
        ("drive", 2, 1 + 32 / 4096),
        ("eden:bits=4", 4, 3 * (4 + 32 / 4096)),
        ("eden:bits=4,requantise=yes", 4, 0.75 * 2 * (4 + 32 / 4096)),
        ("lloyd-max:bits=2", 4, 6),
    ],
)
def test_bits_of_codes(code: str, workers: int, bits: float) -> None:
    assert one(code, workers)["bits_per_coordinate"] == pytest.approx(bits, rel=1e-5)


def test_padding_is_counted() -> None:
    # 1100 coordinates take 2048 lanes of one rotated block.
    assert one("thc:bits=4", 4, length=1100)["bits_per_coordinate"] == pytest.approx(
        (0.75 * 11 * 2048 + 1.5 * 32) / 1100, rel=1e-5
    )
    assert one("eden:bits=4", 2, length=1100)["bits_per_coordinate"] == pytest.approx((4 * 2048 + 32) / 1100, rel=1e-5)


def test_bits_of_factors() -> None:
    gradients = made("low-rank", 4, LENGTH, 0.5, 0)
    found = peers.power_sgd(gradients, 0, rank=1)
    assert found is not None
    matrix = 28 * 252
    assert found.traffic == ring(4, 32 * (28 + 252 + LENGTH - matrix))
    assert peers.power_sgd(made("gaussian", 4, LENGTH, 0.5, 0), 0, rank=1) is None, "no matrices, no row"
    assert peers.power_sgd(of(torch.randn(2, 12), (3, 4)), 0, rank=1) is None, "not half as large: as it is"


def test_bits_of_gradiveq_count_its_rounds_of_learning_and_its_bases() -> None:
    row = one("gradiveq", 4, 0.5, "low-rank", 1 << 13)
    # Directions of 265 values at most are told ten times as seldom as slices, so 7 channels of 28 filters; of 196
    # directions 18 at most, as some slices travel whole: two of 36 in the first turn.
    size, slices = 28 * 7, 36
    directions = 18
    coded = (LENGTH - 7056 + (slices - 2) * directions + 2 * size) * 64 * 0.75
    learning = LENGTH * 64 * 0.75
    bases = 0.75 * (64 + 32 + size * directions * 32)
    assert row["bits_per_coordinate"] == pytest.approx(
        (490 * coded + 10 * learning + 5 * bases) / 500 / LENGTH, rel=1e-5
    )
    assert not measure([parse_code("gradiveq")], [made_setting("gaussian", 2, 0.0, LENGTH)], 1)


def test_bits_of_low_rank_are_the_average_of_both_sides() -> None:
    bits = (64 * 0.75) * (LENGTH - 28 * 252 + 4 * (28 + 252) / 2) / LENGTH
    assert one("lowrank:rank=4", 4, 0.5, "low-rank")["bits_per_coordinate"] == pytest.approx(bits, rel=1e-5)
    for law in ("gaussian", "sparse"):  # no matrices; no rounds before, that tell directions
        assert not measure([parse_code("lowrank:rank=4")], [made_setting(law, 2, 0.0, LENGTH)], 1)


# --- errors


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009501), (5, 0.002505)])
def test_lloyd_max_levels(bits: int, error: float) -> None:
    levels, found = lloyd_max(bits)
    assert found == pytest.approx(error, rel=6e-4)
    assert levels == pytest.approx([-level for level in reversed(levels)])
    if bits == 1:
        assert levels[1] == pytest.approx((2 / pi) ** 0.5)


@pytest.mark.parametrize(
    ("code", "nmse", "within"),
    [
        ("eden:bits=1", pi / 2 - 1, 0.03),
        ("eden:bits=2", 0.1175 / (1 - 0.1175), 0.03),
        ("eden:bits=4", 0.009501 / (1 - 0.009501), 0.03),
        ("drive", 1 - 2 / pi, 0.03),
        ("lloyd-max:bits=1", pi / 2 - 1, 1e-3),
        ("lloyd-max:bits=3", 0.03454 / (1 - 0.03454), 1e-3),
    ],
)
def test_errors_that_theory_tells(code: str, nmse: float, within: float) -> None:
    assert one(code)["nmse"] == pytest.approx(nmse, rel=within)
    # The mean of independent vectors, each with an error of its own, is off by as much.
    assert one(code, 4)["nmse"] == pytest.approx(nmse, rel=0.06)


def test_unbiased_peers_gain_from_correlation_what_theory_tells() -> None:
    assert one("eden:bits=2", 8, 0.5)["nmse"] == pytest.approx(0.1331 / (1 + 7 * 0.5), rel=0.05)
    assert one("eden:bits=2,requantise=yes", 8, 0.5)["nmse"] == pytest.approx(0.1331 * (1 / 4.5 + 1), rel=0.07)


def test_halves_are_off_by_their_last_bit() -> None:
    # 1 + 2**-8 lies half-way between halves and goes to the even one, 1; 3 is exact.
    found = peers.bf16(of(torch.tensor([[1 + 2**-8, 3.0]])), 0)
    assert found.nmse == pytest.approx((2**-16) / (9 + (1 + 2**-8) ** 2))
    # Hops round too: 256 + 1 has no half, though 256 and 1 have.
    assert peers.bf16(of(torch.tensor([[512.0], [2.0]])), 0).nmse == pytest.approx((1 / 257) ** 2)
    assert peers.fp32(of(torch.tensor([[512.0], [2.0]])), 0).nmse == 0


def test_fp8_keeps_what_has_three_bits_of_fraction() -> None:
    exact = torch.tensor([[448.0, 1.0, 1.125, -0.875, 0.0]])
    assert peers.fp8(of(exact), 0).nmse == 0
    assert peers.fp8(of(torch.tensor([[448.0, 15.5]])), 0).nmse == pytest.approx(0.25 / (448**2 + 15.5**2))


@pytest.mark.parametrize(
    "peer",
    [
        lambda gradients, seed: peers.qsgd(gradients, seed, levels=1),
        lambda gradients, seed: peers.qsgd(gradients, seed, levels=3, norm="euclidean"),
        lambda gradients, seed: peers.tern_grad(gradients, seed, clipped=100.0),
        lambda gradients, seed: peers.tern_grad(gradients, seed, scale="shared", clipped=100.0),
        lambda gradients, seed: peers.eden(gradients, seed, bits=1, block=64),
        lambda gradients, seed: peers.eden(gradients, seed, bits=2, block=64, requantise=True),
    ],
)
def test_peers_are_unbiased(peer, monkeypatch: pytest.MonkeyPatch) -> None:
    means = []
    monkeypatch.setattr(peers.MeasuredCode, "of", lambda mean, gradients, traffic: means.append(mean))
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    rounds = 200
    for seed in range(rounds):
        peer(of(vectors), seed)
    found = torch.stack(means).double()
    scores = (found.mean(0) - vectors.mean(0)) / found.std(0) * rounds**0.5
    assert float(scores.abs().max()) < 4.5
    assert float(scores.square().mean()) < 2


def test_qsgd_of_three_numbers() -> None:
    # Norm 5: 3 and 4 are the levels 3/5 and 4/5 of 5, exactly.
    assert peers.qsgd(of(torch.tensor([[3.0, -4.0, 0.0]])), 0, levels=5, norm="euclidean").nmse < 1e-12
    found = peers.qsgd(of(torch.tensor([[4.0, -4.0, 0.0, 0.0]])), 0, levels=1, coder="entropy")
    assert found.nmse == 0
    assert found.traffic.bits == pytest.approx(4 * (0.5 + 0.25 * 2 * log2(4)) + 32)  # half zeros, a quarter each sign


def test_clipping_and_scale_of_terngrad() -> None:
    # The first vector's largest is 1, the second's 3: exact with a scale of its own, as it is 0 or the largest.
    vectors = torch.tensor([[1.0, -1.0, 0.0, 0.0], [3.0, 0.0, -3.0, 0.0]])
    assert peers.tern_grad(of(vectors), 0, clipped=100.0).nmse == 0
    assert peers.tern_grad(of(vectors), 0, scale="shared", clipped=100.0).nmse > 0
    assert peers.tern_grad(of(vectors[:, :2]), 0, clipped=0.5).nmse > 0.1
    layers = of(torch.tensor([[1.0, -1.0, 100.0, 100.0]]), (2,), (2,))
    assert peers.tern_grad(layers, 0, clipped=200.0).nmse == 0


def test_factors_of_low_rank_are_exact_and_start_from_earlier_rounds() -> None:
    chance = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 2, generator=chance), torch.randn(2, 20, generator=chance)
    rows = torch.stack([(left * torch.randn(2, generator=chance)) @ right for _ in range(2)]).view(2, -1)
    found = peers.power_sgd(of(rows, (12, 4, 5)), 0, rank=2)
    assert found is not None
    assert found.nmse < 1e-10
    gradients = made("low-rank", 4, LENGTH, 0.5, 0)
    warm, cold = (
        peers.power_sgd(Gradients(gradients.vectors, gradients.shapes, earlier), 0, rank=4)
        for earlier in (gradients.earlier, gradients.earlier[:0])
    )
    assert warm is not None
    assert cold is not None
    assert warm.nmse < cold.nmse


def test_the_defects_of_the_public_code_cost_what_was_computed() -> None:
    gradients = made("gaussian", 8, 1 << 15, 0.0, 0)
    assert peers.thc_public(gradients, 0).nmse == pytest.approx(0.0628, rel=0.06)
    assert peers.thc_public(gradients, 0, noise="private").nmse == pytest.approx(0.0205, rel=0.06)
    scaled = made("lognormal-2", 4, 1 << 15, 0.5, 0)
    assert peers.thc_public(scaled, 0).nmse > 3 * peers.thc_public(scaled, 0, norm="block").nmse


def test_figures_that_our_codes_have_to_reach() -> None:
    assert one("thc:bits=4", 8, 0.0, length=1 << 15)["nmse"] <= 0.0112
    assert one("thc:bits=4", 8, 0.5, length=1 << 15)["nmse"] <= 0.0028
    row = one("thc:bits=4", 4, 0.5, "lognormal-2", length=1 << 15)
    assert row["nmse"] <= 0.010
    assert row["bits_per_coordinate"] <= 9.2
    assert one("gradiveq:ratio=2", 4, 0.5, "low-rank")["nmse"] < 0.05
    assert one("fixed:bits=8", 4)["nmse"] < 2e-4


def test_rows_average_over_seeds_and_name_their_vectors() -> None:
    setting = made_setting("gaussian", 2, 0.5, 1024)
    (row,) = measure([parse_code("drive")], [setting], seeds=3)
    single = [peers.drive(setting.draw(seed), seed).nmse for seed in range(3)]
    assert row["nmse"] == pytest.approx(np.mean(single), rel=1e-5)
    half = 4.302653 * np.std(single, ddof=1) / 3**0.5
    assert row["nmse_high"] - row["nmse"] == pytest.approx(half, rel=1e-3)
    assert list(row)[:6] == FIXED
    assert (row["distribution"], row["workers"], row["correlation"], row["seeds"]) == ("gaussian", 2, 0.5, 3)
    assert row["correlation_found"] == pytest.approx(0.5, abs=0.1)
    (alone,) = measure([parse_code("drive")], [setting], seeds=1)
    assert alone["nmse_high"] is None


def test_vectors_of_zeros_give_no_figure_and_no_crash() -> None:
    nothing = Moment(np.zeros((2, 4096), np.float32), np.zeros((0, 4096), np.float32))
    still = recorded_settings(Recorded("still", ("a",), ((4096,),), {"late": nothing}), 2)
    rows = measure([parse_code(code) for code in ("thc", "eden:bits=2", "fp8", "qsgd:levels=3", "terngrad")], still, 1)
    assert [row["nmse"] for row in rows] == [None] * 5


# --- recorded gradients


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = read_gradients(recording(tmp_path / "tiny.npz"))
    assert (found.task, found.shapes, list(found.moments)) == ("tiny", SHAPES, ["early", "late"])
    assert found.names[2] == "conv.weight"
    assert found.moments["early"].earlier.shape == (5, 1288)
    settings = recorded_settings(found, 2)
    assert [setting.distribution for setting in settings] == ["tiny-early", "tiny-late"]
    assert torch.equal(settings[0].draw(0).vectors, torch.from_numpy(found.moments["early"].workers[:2]))
    assert recorded_settings(found, 4) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers_early": np.zeros((2, 5), "f4")}, r"workers_early must be float32 \[rows, 1288\]"),
        ({"workers_early": np.zeros((2, 1288))}, "found float64"),
        ({"workers_early": np.full((2, 1288), np.nan, "f4")}, "not finite; record another step"),
        ({"workers_early": np.zeros((0, 1288), "f4")}, "holds no worker"),
        ({"earlier_early": np.zeros((2, 3), "f4")}, "earlier_early must be"),
        ({"shapes": np.array(["8xtwo"])}, "shapes must be such as 64x3x3x3"),
        ({"names": np.array(["a"])}, "must hold task, names, shapes"),
        ({"workers_early": None}, "must hold task, names, shapes"),
        ({"task": None}, "must hold task, names, shapes"),
        ({"names": np.array([{}], object)}, "is not an npz file of plain arrays"),
    ],
)
def test_a_recording_that_is_wrong_is_told(tmp_path: Path, change: dict, message: str) -> None:
    with np.load(recording(tmp_path / "tiny.npz")) as file:
        arrays = {name: file[name] for name in file.files if not name.endswith("late")}
    arrays = {name: array for name, array in (arrays | change).items() if array is not None}
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ConfigurationError, match=message):
        read_gradients(tmp_path / "wrong.npz")


@pytest.mark.parametrize("content", [None, b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_recording_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "gradients.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"gradients: .*gradients\.npz (cannot be read|is not an npz file)"):
        read_gradients(path)


def test_gradients_are_recorded_from_a_training(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "record_gradients.py"
    spec = importlib.util.spec_from_file_location("record_gradients", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "text.txt").write_text("all work and no play makes a dull text " * 600)
    options = ["--task", "transformer", "--data", tmp_path / "text.txt", "--out", tmp_path / "t.npz"]
    options += ["--steps", 8, "--workers", 2, "--batch", 2, "--earlier", 2]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(module.main, [*map(str, options)], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    found = read_gradients(tmp_path / "t.npz")
    assert list(found.moments) == ["early", "mid", "late"]
    assert [moment.earlier.shape[0] for moment in found.moments.values()] == [2, 2, 2]
    assert len(found.names) == len(found.shapes) > 20
    early, late = found.moments["early"], found.moments["late"]
    assert early.workers.shape[0] == 2
    # Both see the same text over and over, so they agree, but are not the same.
    assert 0.2 < (correlation_of(torch.from_numpy(early.workers)) or 0) < 0.999
    assert not np.array_equal(early.workers, late.workers)
    assert not np.array_equal(early.earlier[0], early.earlier[1])


# --- the command


def test_the_command_writes_rows_tables_and_a_figure(tmp_path: Path) -> None:
    codes = [option for code in ("fp32", "thc:bits=2", "thc:bits=4", "eden:bits=1") for option in ("--code", code)]
    out = tmp_path / "codes"
    result = run(
        *codes, "--workers", "1,2", "--correlation", "0,.5", "--distribution", "gaussian,sparse", "--length", 4096,
        "--seeds", 2, "--json", f"{out}.json", "--markdown", f"{out}.md", "--figure", f"{out}.svg",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(Path(f"{out}.json").read_text())
    rows = document["rows"]
    assert len(rows) == 2 * 3 * 4  # one worker has no correlation
    assert all(row[key] is not None for row in rows for key in FIXED)
    assert document["arguments"]["workers"] == "1,2"
    assert {row["topology"] for row in rows if row["workers"] == 1} == {"one message"}
    assert "gaussian, 2 workers" in result.stdout
    assert "all-gather: messages cannot be added" in result.stdout
    table = Path(f"{out}.md").read_text()
    assert "| thc:bits=4 | sharded | 5.01 |" in table
    assert "NMSE, ρ=0.5 |" in table
    drawn = Path(f"{out}.svg").read_text()
    for text in ("sparse · n=2 · ρ=0.5", "bits per coordinate and rank", ">thc<", ">eden<"):
        assert text in drawn


def test_the_command_reads_recordings(tmp_path: Path) -> None:
    path = recording(tmp_path / "tiny.npz")
    out = tmp_path / "rows.json"
    some = ("--code", "gradiveq", "--code", "powersgd:rank=1", "--code", "bf16", "--seeds", 1)
    result = run("--gradients", path, "--workers", "2,8", "--json", out, *some)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["workers"] for row in rows} == {2}, "there are no gradients of eight"
    by_name = {(row["distribution"], row["code"]): row for row in rows}
    # Without rounds to learn from there is no GradiVeQ.
    assert set(by_name) == {
        *(("tiny-early", code) for code in ("gradiveq", "powersgd:rank=1", "bf16")),
        *(("tiny-late", code) for code in ("powersgd:rank=1", "bf16")),
    }
    assert by_name["tiny-early", "bf16"]["correlation"] == by_name["tiny-early", "bf16"]["correlation_found"]
    assert "intervals are over the codes' randomness alone" in result.stdout
    with_laws = run("--gradients", path, "--workers", 2, "--distribution", "gaussian", "--length", 1024, *some)
    assert "gaussian, 2 workers" in with_laws.stdout
    assert "tiny-late, 2 workers" in with_laws.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--code", "zip"), "code 'zip' is unknown; allowed are fp32, bf16"),
        (("--code", "thc:bit=4"), "code 'thc:bit=4': setting 'bit' is unknown; allowed are bits, granularity"),
        (("--code", "thc:bits=9"), "code 'thc:bits=9': bits: must be a whole number from 1 to 8, found 9"),
        (("--code", "thc:p=1/0"), "p: must be a number such as 0.03 or 1/32, found '1/0'"),
        (("--code", "thc:rounding=up"), "rounding: must be one of correlated, stochastic, nearest, found 'up'"),
        (("--code", "gradiveq:ratio=.5"), "ratio: must be a finite number of 1 or more"),
        (("--code", "qsgd"), "code 'qsgd': say levels"),
        (("--code", "eden:bit=2"), "code 'eden:bit=2': setting 'bit' is unknown; allowed are bits, block"),
        (("--code", "bf16+thc"), "code 'bf16+thc' is unknown"),
        (("--code", "thc+fp32"), "thc takes no code inside"),
        (("--code", "ef+thc"), "code 'ef+thc': one round is measured, in which nothing is owed yet: leave ef+ out"),
        (("--code", "eden:bits=9"), "bits: must be 1 to 8, found 9"),
        (("--code", "eden:bits=2,block=100"), "block: must be a power of two from 8, found 100"),
        (("--code", "terngrad:clipped=0"), "clipped: must be above 0"),
        (("--distribution", "uniform"), "distribution 'uniform' is unknown; allowed are gaussian, lognormal-1"),
        (("--correlation", "2"), "correlation: must be from 0 to 1, found 2"),
        (("--correlation", "high"), "correlation must be a number, found 'high'"),
        (("--workers", "0"), "workers: must be 1 or more, found 0"),
        (("--workers", "2,"), "workers must be a whole number, found ''"),
        (("--gradients", "none.npz"), "gradients: none.npz cannot be read"),
        (("--json", "no/such/x.json"), "json: no/such/x.json cannot be written"),
        (("--figure", "x.pdf"), "figure: x.pdf must end in .png or .svg"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_too_few_recorded_workers_are_told(tmp_path: Path) -> None:
    result = run("--gradients", recording(tmp_path / "tiny.npz"), "--workers", 4)
    assert result.exit_code == 2
    assert "workers: the recorded gradients are of 3 workers; give at most so many" in result.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lowrank:rank=4,inner=thc", "lowrank:rank=4+thc:block=512"),
        ("lowrank:inner=fp32,rank=4", "lowrank:rank=4"),
        ("gradiveq:inner=thc", "gradiveq+thc"),
        ("gradiveq:inner=thc,ratio=4", "gradiveq:ratio=4+thc"),
    ],
)
def test_the_old_way_to_put_thc_inside_is_the_new_one(old: str, new: str) -> None:
    rows = measure([parse_code(old), parse_code(new)], [made_setting("low-rank", 2, 0.5, LENGTH)], 1)
    assert [row.pop("code") for row in rows] == [old, new]
    assert rows[0] == rows[1]


def test_all_default_codes_can_be_read() -> None:
    assert len({parse_code(code).code for code in DEFAULT_CODES}) == len(DEFAULT_CODES) > 40
    assert "Examples:\n    evenkeel bench codes" in run("--help").output


def test_the_command_itself_loads_no_torch() -> None:
    code = "import sys, evenkeel.bench.codes.command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
