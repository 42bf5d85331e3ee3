"""`evenkeel bench gradients`: two workers over loopback for real, and its parts on made-up figures."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.bench.gradients import command as gradients_command, measure as gradients
from evenkeel.bench.gradients.cells import TASKS, Cell, Records, Training, read_method
from evenkeel.bench.gradients.data import read_data
from evenkeel.bench.gradients.figure import gradients as gradients_figure
from evenkeel.bench.gradients.rows import rows_of
from evenkeel.bench.gradients.socket_bytes import socket_bytes
from evenkeel.cli.main import main
from evenkeel.errors import ConfigurationError, EvenkeelError

FIXED = (
    *("task", "method", "rate", "seed", "seconds_to_target", "final_accuracy"),
    *("step_s", "bytes_per_step", "encode_s", "decode_s", "comm_share"),
)
PARAMETERS = 784 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 10 + 10
TRAINING = Training(steps=4, batch=8, workers=2, evaluations=2, data="synthetic")


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "gradients", *map(str, arguments)])


@pytest.fixture
def no_root(monkeypatch):
    """As for a user without rights."""
    monkeypatch.setattr(gradients, "lab_missing", lambda: "the lab needs root")
    monkeypatch.setattr(gradients_command, "lab_missing", lambda: "the lab needs root")


@pytest.fixture
def no_workers(monkeypatch):
    """Trainings whose figures are made up: thc sends a tenth, in half the time, and its accuracy is what one asks."""
    trained = []

    def train(work, data, records, **options):
        for cell, training in work:
            trained.append(cell)
            records.keep(cell, training, figures(training.steps, 0.5 if cell.method == "thc" else 1.0))

    monkeypatch.setattr(gradients_command, "train_cells", train)
    return trained


def figures(steps=4, pace=1.0, final=0.9, loss=1.0):
    times = [pace * (step + 1) for step in range(steps)]
    return {
        "parameters": 10,
        "losses": [loss / (step + 1) for step in range(steps)],
        "times_s": times,
        "sent_bytes": [100.0 * (step + 1) for step in range(steps)],
        "evaluations": [[steps // 2, final - 0.2], [steps, final]],
        "compute_s": 0.1,
        "encode_s": 0.4,
        "add_s": 0.0,
        "decode_s": 0.4,
        "communicate_s": None,
        "resent_bytes": 0.0,
        "counted_bytes": None,
        "local_nmse": None,
        "peak_bytes": 1000,
        "link": {},
    }


def sent_once(row):
    assert 0 <= row["resent_bytes_per_step"] < row["bytes_per_step"]
    return row["bytes_per_step"] - row["resent_bytes_per_step"]


def record(method="fp32", seed=0, **changes):
    cell = {"task": "mlp", "method": method, "rate": "100mbit", "seed": seed}
    return {"cell": cell, "training": {"workers": 4, "batch": 8}, **figures(**changes)}


@pytest.mark.timeout(300)
def test_two_workers_train_over_loopback_and_are_not_asked_again(tmp_path, no_root):
    pytest.importorskip("torch")
    arguments = ("--workers", 2, "--steps", 12, "--batch", 8, "--evaluations", 2, "--methods", "fp32,pipe+thc")
    arguments += ("--records", tmp_path / "kept", "--json", tmp_path / "rows.json", "--figure", tmp_path / "loss.png")
    result = run(*arguments, "--markdown", tmp_path / "table.md")
    assert result.exit_code == 0, result.output
    assert "over loopback" in result.output
    assert "times the computation" in result.output
    rows = {(row["method"], row["seed"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert set(rows) == {(method, seed) for method in ("fp32", "pipe+thc") for seed in ("mean", 0)}
    plain, coded = rows["fp32", 0], rows["pipe+thc", 0]
    for row in rows.values():
        assert set(FIXED) <= set(row)
        assert row["step_s"] > 0
    # Two ranks exchange all of it once; headers are not counted, nor here what a busy machine's TCP had to send again.
    assert sent_once(plain) == pytest.approx(4 * PARAMETERS, rel=0.01)
    # Ten of twelve steps are compressed, to 4 bits up and 6 down for each half.
    assert sent_once(coded) == pytest.approx(PARAMETERS * (2 * 4 + 10 * (4 + 6) / 16) / 12, rel=0.02)
    assert plain["encode_s"] == 0
    assert coded["encode_s"] > 0
    assert 0 < plain["seconds_to_target"] <= plain["evaluations"][-1]["second"] == plain["seconds"]
    assert len(plain["curve"]["loss"]) == 12
    assert plain["curve"]["loss"][0] == pytest.approx(coded["curve"]["loss"][0])  # the same weights and examples
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| fp32 |" in (tmp_path / "table.md").read_text()

    before = (tmp_path / "rows.json").read_text()
    (tmp_path / "rows.json").unlink()
    assert "2 of 2 trainings are in the records already" in run(*arguments).output
    assert json.loads(before)["rows"] == json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_a_worker_that_fails_ends_the_run_and_is_heard(tmp_path, no_root, monkeypatch):
    monkeypatch.setattr(gradients, "_need_torch", lambda: None)
    (tmp_path / "broken.py").write_text("import sys; sys.exit('the dog ate the gradients')")
    monkeypatch.setattr(gradients, "_WORKER", "broken")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    data = read_data("mlp", {})
    with pytest.raises(
        EvenkeelError, match=r"(?s)mlp with fp32 at unlimited, seed 0: rank. ended with exit code 1.*dog"
    ):
        gradients.train_cells(
            [(Cell("mlp", "fp32", "unlimited", 0), TRAINING)], {"mlp": data}, Records(tmp_path / "kept")
        )


def test_without_torch_the_install_line_is_told(tmp_path, no_root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("--steps", 2)
    assert result.exit_code == 1
    assert "pip install 'evenkeel[train]'" in result.output


def test_only_missing_trainings_are_measured(tmp_path, no_root, no_workers):
    asked = ("--records", tmp_path / "kept", "--steps", 4)
    assert run(*asked, "--methods", "thc").exit_code == 0
    assert [cell.method for cell in no_workers] == ["fp32", "thc"]  # fp32 sets the target
    assert run(*asked, "--methods", "bf16,thc").exit_code == 0
    assert [cell.method for cell in no_workers] == ["fp32", "thc", "bf16"]
    assert run(*asked, "--methods", "thc", "--seeds", 2).exit_code == 0
    assert [(cell.method, cell.seed) for cell in no_workers[3:]] == [("fp32", 1), ("thc", 1)]
    # Trained differently they are others.
    assert run(*asked, "--methods", "thc", "--batch", 3).exit_code == 0
    assert [cell.method for cell in no_workers[5:]] == ["fp32", "thc"]


def test_the_table_tells_ratio_gain_and_loss(tmp_path, no_root, no_workers):
    result = run("--methods", "thc,pipe", "--steps", 4, "--seeds", 3, "--figure", tmp_path / "loss.svg")
    assert result.exit_code == 0, result.output
    assert "A step of fp32 takes 1000 ms, 100 ms of it computation" in result.output
    assert "9 times the computation" in result.output
    assert "means over 3 seeds" in result.output
    assert "the first 10% of the steps" in result.output
    drawn = (tmp_path / "loss.svg").read_text()
    for text in ("mlp at unlimited", "seconds to the target", ">thc<", ">pipe<"):
        assert text in drawn


def test_a_loss_is_told_in_three_digits(monkeypatch, no_root):
    def train(work, data, records, **options):
        for cell, training in work:
            pace = {"thc": 1.2345, "pipe": 1.0034}.get(cell.method, 1.0)
            records.keep(cell, training, figures(training.steps, pace))

    monkeypatch.setattr(gradients_command, "train_cells", train)
    result = run("--methods", "thc,pipe", "--steps", 4)
    assert "thc loses here: 1.23 times the time of fp32" in result.output
    assert "pipe loses here: 1.00 times the time of fp32" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tasks", "vgg"), "tasks: there is no 'vgg'; there are mlp, convnet, transformer"),
        (("--tasks", ","), "tasks: name one"),
        (("--methods", "zip"), "methods: there is no 'zip'; there are fp32, bf16"),
        (("--methods", "pipe+fp32"), "methods: there is no 'pipe+fp32'"),
        (("--rates", "100mbit"), "rates: the lab needs root; without it only --rates unlimited"),
        (("--rates", "fast"), "rates must be"),
        (("--rates", ","), "rates: name one"),
        (("--steps", 2, "--epochs", 1), "epochs: --steps and --epochs exclude each other"),
        (("--tasks", "transformer", "--epochs", 1), "epochs: a text has none"),
        (("--batch", 5000), "batch: 4 workers with 5000 each need more than mlp's 8192 examples"),
        (("--mnist", "nowhere.gz"), "nowhere.gz: no such file"),
        (("--tasks", "transformer", "--text", "nowhere.txt"), "text: nowhere.txt cannot be read"),
        (("--json", "nowhere/rows.json"), "json: nowhere/rows.json cannot be written"),
        (("--figure", "rows.pdf"), "figure: rows.pdf must end in"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(arguments, says, no_root, no_workers):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output
    assert not no_workers


@pytest.mark.parametrize(
    ("name", "schedule", "code", "feedback"),
    [
        ("fp32", "", "fp32", True),
        ("pipe", "pipe", "fp32", False),
        ("pipe-ahead+bf16", "pipe-ahead", "bf16", True),
        ("pipe+powersgd:rank=12", "pipe", "powersgd:rank=12", True),
        ("thc:bits=2,block=64", "", "thc:bits=2,block=64", True),
        ("fixed:bits=8", "", "fixed:bits=8", True),
        ("ef+thc", "", "ef+thc", True),
        ("no-ef+thc", "", "thc", False),
        ("pipe-ahead+no-ef+lowrank:rank=4+thc", "pipe-ahead", "lowrank:rank=4+thc", False),
        # As they were written before settings had names.
        ("powersgd12", "", "powersgd:rank=12", True),
        ("thc8", "", "thc:bits=8", True),
        ("thc4-no-ef", "", "thc:bits=4", False),
        ("gradiveq4", "", "gradiveq:ratio=4", True),
        ("pipe+gradiveq16+thc", "pipe", "gradiveq:ratio=16+thc", True),
        ("lowrank4", "", "lowrank:rank=4", True),
        ("lowrank16+thc", "", "lowrank:rank=16+thc:bits=4,block=512", True),
        ("pipe-ahead+lowrank1+thc2-no-ef", "pipe-ahead", "lowrank:rank=1+thc:bits=2,block=512", False),
    ],
)
def test_methods_that_there_are(name, schedule, code, feedback):
    pytest.importorskip("torch", reason="codes of gradients need evenkeel[train]")
    found = read_method(name)
    assert (found.schedule, found.code) == (schedule, code)
    assert found.error_feedback == feedback
    assert found.is_sum_code == (code.partition(":")[0] not in ("fp32", "bf16", "powersgd"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "thc9",
        "thc:bits=9",
        "powersgd0",
        "powersgd",
        "pipe+",
        "pipe-ahead+",
        "pipe+pipe",
        "pipe-ahead+fp32",
        "no-ef+bf16",
        "bf16+thc",
        "gradiveq+bf16",
        "gradiveq1",
        "fp32+thc",
        "lowrank0",
        "lowrank4+thc9",
    ],
)
def test_methods_that_there_are_not(name):
    pytest.importorskip("torch", reason="codes of gradients need evenkeel[train]")
    with pytest.raises(ConfigurationError, match="there is no"):
        read_method(name)


def test_the_one_old_method_that_would_mean_something_else_is_answered_with_the_new_ones():
    with pytest.raises(ConfigurationError, match=r"write pipe\+gradiveq:ratio=2\+thc or pipe\+gradiveq:ratio=8\+thc"):
        read_method("pipe+gradiveq+thc")


def test_settings_in_a_list_of_methods_keep_their_commas():
    pytest.importorskip("torch", reason="codes of gradients need evenkeel[train]")
    listed = "thc:bits=2, block=64,pipe+thc ,lowrank:seed=1,rank=4+thc:bits=2,block=512,bf16"
    assert gradients_command._methods(listed, "mlp") == [
        "fp32",
        "thc:bits=2, block=64",
        "pipe+thc",
        "lowrank:seed=1,rank=4+thc:bits=2,block=512",
        "bf16",
    ]


def test_a_fraction_in_a_method_is_no_folder_of_its_records(tmp_path):
    records, training = Records(tmp_path / "records"), Training(1, 1, 1, 1, "none")
    kept = records.keep(Cell("mlp", "thc:p=1/32", "1gbit", 0), training, {"seconds": 1})
    assert records.find(Cell("mlp", "thc:p=1/32", "1gbit", 0), training) == kept


def test_every_task_compares_methods_that_there_are():
    pytest.importorskip("torch", reason="codes of gradients need evenkeel[train]")
    for task in TASKS.values():
        for method in task.methods:
            read_method(method)


def test_time_to_target_lies_between_the_evaluations_around_it():
    rows = rows_of([record(), record("thc", pace=0.5, final=0.95)], tolerance=0.1)
    plain, coded = rows[1], rows[3]
    assert plain["target_accuracy"] == pytest.approx(0.8)
    assert plain["seconds_to_target"] == pytest.approx(3)  # half way from .7 at 2 s to .9 at 4 s
    assert coded["seconds_to_target"] == pytest.approx(1.25)
    assert coded["speed_up"] == pytest.approx(2.4)
    assert coded["accuracy_change"] == pytest.approx(0.05)
    assert plain["step_s"] == plain["steady_step_s"] == 1
    assert plain["bytes_per_step"] == plain["steady_bytes_per_step"] == 100
    assert plain["encode_s"] == pytest.approx(0.1)
    assert plain["comm_share"] == pytest.approx(0.7)  # .1 computing, .1 encoding, .1 decoding
    assert (plain["aggregate_s"], plain["aggregate_cut"]) == (pytest.approx(0.9), 1)
    assert coded["aggregate_cut"] == pytest.approx(0.9 / 0.4)


def test_each_seed_has_its_own_target_and_the_mean_its_interval():
    rows = rows_of(
        [record(seed=0), record(seed=1, final=0.8), record("thc", 0), record("thc", 1, final=0.7)], tolerance=0.01
    )
    plain, coded = (
        next(row for row in rows if (row["method"], row["seed"]) == (name, "mean")) for name in ("fp32", "thc")
    )
    assert (plain["reached"], coded["reached"]) == (2, 1)
    assert coded["seconds_to_target"] is None
    assert coded["speed_up"] is None
    assert plain["final_accuracy"] == pytest.approx(0.85)
    assert plain["final_accuracy_low"] < 0.8 < 0.9 < plain["final_accuracy_high"]
    assert coded["accuracy_change"] == pytest.approx(-0.05)


def test_the_figure_says_how_many_seeds_reached_the_target():
    finals = {"fp32": (0.9, 0.8), "thc": (0.9, 0.7), "bf16": (0.6, 0.6)}
    found = [record(name, seed, final=final) for name, pair in finals.items() for seed, final in enumerate(pair)]
    drawn = gradients_figure(rows_of(found, tolerance=0.01))
    said = [text.get_text() for text in drawn.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert (said.count("by 1 of 2 seeds"), said.count("not reached")) == (1, 1)


def test_a_loss_that_is_not_finite_is_no_number():
    row = rows_of([record(loss=float("inf"))], tolerance=0)[1]
    assert np.isnan(row["curve"]["loss"]).all()


def test_a_damaged_record_is_named(tmp_path):
    records, cell = Records(tmp_path), Cell("mlp", "fp32", "1gbit", 0)
    records.keep(cell, TRAINING, {"seconds": 1})
    assert records.find(cell, TRAINING)["seconds"] == 1
    path = next(tmp_path.iterdir())
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=f"{path.name}.*remove it to measure it again"):
        records.find(cell, TRAINING)


def test_ranks_that_end_differently_are_refused():
    part = {"weights": 1, "begin": 0.0, "sent_bytes": [1], "losses": [1.0], "times": [1.0], "evaluations": []}
    with pytest.raises(EvenkeelError, match="different weights"):
        gradients._together(Cell("mlp", "thc", "unlimited", 0), [part, part | {"weights": 2}])


def test_images_with_tests_beside_them(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 30), ("test", 20)):
        images = random.integers(0, 255, (count, 28, 28, 3)).astype(np.uint8)
        np.savez(tmp_path / f"digits-{name}.npz", images=images, labels=np.arange(count) % 3)
    data = read_data("mlp", {"mlp": tmp_path / "digits-train.npz"})
    assert data.inputs.shape == (30, 28, 28)
    assert len(data.test_inputs) == 20
    assert (data.classes, data.source, data.stand_in) == (3, "digits-train.npz", False)
    (tmp_path / "digits-test.npz").unlink()
    data = read_data("convnet", {"convnet": tmp_path / "digits-train.npz"})
    assert data.inputs.shape == (27, 32, 32, 3)
    assert data.test_targets.tolist() == [0, 1, 2]  # images 0, 10 and 20


def test_images_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((30, 28, 28, 3), np.uint8))
    with pytest.raises(ConfigurationError, match=r"mlp: .*images.npz has no labels"):
        read_data("mlp", {"mlp": tmp_path / "images.npz"})


def test_text_is_cut_for_testing(tmp_path):
    (tmp_path / "text.txt").write_text("abcd" * 10_000)
    data = read_data("transformer", {"transformer": tmp_path / "text.txt"})
    assert (len(data.inputs), len(data.test_inputs), data.classes) == (36_000, 4_000, 4)
    (tmp_path / "text.txt").write_text("abcd")
    with pytest.raises(ConfigurationError, match="has 4 characters; give 20000 or more"):
        read_data("transformer", {"transformer": tmp_path / "text.txt"})


def test_data_of_another_content_are_others(tmp_path):
    made = read_data("mlp", {})
    assert made.stand_in
    assert made.identity == read_data("mlp", {}).identity != read_data("convnet", {}).identity


def test_sent_bytes_are_what_was_sent():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        with here:
            before = socket_bytes()
            there.sendall(bytes(1000))
            here.sendall(bytes(234))
            assert here.recv(1000, socket.MSG_WAITALL)
            assert there.recv(234, socket.MSG_WAITALL)
            now = socket_bytes()
            assert now.sent - before.sent - (now.resent - before.resent) == 1234


NARROW = "ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate 20mbit burst 3kb limit 6kb"
SEND = """
import socket
import subprocess
import sys
from evenkeel.bench.gradients.socket_bytes import socket_bytes
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
    here, _ = server.accept()
    there.sendall(bytes(100_000))
    here.recv(100_000, socket.MSG_WAITALL)
    print(*socket_bytes())
"""


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.skipif(bool(gradients.lab_missing()), reason=gradients.lab_missing())
def test_what_is_sent_again_over_a_narrow_link_is_counted():
    command = ["unshare", "--net", "sh", "-c", f'{NARROW} && "$0" -c "$1"', sys.executable, SEND]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sent, resent = map(int, said.split())
    assert 0 < resent <= sent - 100_000


def test_the_worker_is_a_module_of_ours():
    assert Path(gradients.__file__).with_name(f"{gradients._WORKER.rpartition('.')[2]}.py").exists()


@pytest.mark.root
@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(gradients.lab_missing()), reason=gradients.lab_missing())
def test_workers_in_a_lab(tmp_path):
    pytest.importorskip("torch")
    arguments = ("--workers", 2, "--steps", 4, "--batch", 8, "--methods", "fp32", "--rates", "1gbit")
    result = run(*arguments, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "1 Gbit/s links carry" in result.output
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][1]
    assert row["rate"] == "1gbit"
    assert 0 < row["link_bps"] < 1.02e9
    # No faster than the link, both ways at once.
    assert row["step_s"] >= 8 * row["bytes_per_step"] / 1e9
