"""`evenkeel fit` from a classifier file and images to a Collage-CNN that the gateway's codes read."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from evenkeel.backends.worker.model import load_model
from evenkeel.cli.main import main
from evenkeel.coding.answers.collage import Collage
from evenkeel.models.cards import load_card
from fit_helpers import easy_pixels

PIXELS, LABELS = easy_pixels(700, 0)
MEANS = np.stack([PIXELS[label == LABELS].mean((0, 1, 2)) for label in range(10)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows flat colours, as a bare ONNX file of floats; images with and without labels."""
    made = tmp_path_factory.mktemp("fit")
    # Minus half the squared distance to each class's mean colour, up to a constant: linear in the image's mean.
    weight = (MEANS / 255).T.astype(np.float32) * 400
    bias = (-((MEANS / 255) ** 2).sum(1) / 2 * 400).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["mean", "w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(made / "colours.onnx"))
    np.savez(made / "images.npz", images=PIXELS, labels=LABELS)
    np.savez(made / "unlabelled.npz", images=PIXELS)
    return made


def run(folder: Path, out: Path, *more: str, images: str = "images.npz") -> "object":
    arguments = ["fit", "--classifier", str(folder / "colours.onnx"), "--images", str(folder / images)]
    arguments += ["--out", str(out), "--cost", "1e9", "--held-out", "100", *more]
    return CliRunner().invoke(main, arguments)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder of sizes ends at its smallest step, since anything fits the cost of a classifier this cheap."""
    from evenkeel.models import measure
    from evenkeel.vision.fit import size

    monkeypatch.setattr(size, "_ROUNDS", 5)
    monkeypatch.setattr(measure, "LATENCY_ROUNDS", 5)
    smallest = size.Size((16, 24, 32))
    monkeypatch.setattr(size, "sizes", lambda side, coarse=False, widest=128: [smallest])


def test_a_classifier_and_images_become_collage_models_that_codes_read(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--grid", "2,3", "--epochs", "6", "--json", str(tmp_path / "cards.json"))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "cards.json").read_text())["rows"]
    assert [row["grid"] for row in rows] == [2, 3]
    for grid in (2, 3):
        path = tmp_path / "out" / f"colours-collage-{grid}x{grid}.json"
        card = load_card(path)
        assert card.agreement is not None
        assert card.agreement.value > 0.7
        assert card.accuracy is not None
        assert card.reliability
        assert card.notes["calibrated_to"] == "labels"
        assert card.mirrored
        assert card.notes["precision"] == "int8"
        assert card.notes["arithmetic"] in ("bfloat16", "float32")
        assert card.notes["held_out_lost_to_int8"] <= 0.05
        code, model = Collage.from_card(card), load_model(str(path))
        items = list(PIXELS[: grid * grid])
        reply = model.run(code.spares([code.prepare(item) for item in items])[0].inputs)
        answers = code.decode(len(items), {len(items): reply})
        right = sum(int(answers[place].value.argmax()) == LABELS[place] for place in range(len(items)))
        assert right >= len(items) - 3


def test_what_was_fitted_is_served_as_it_is(folder: Path, tmp_path: Path) -> None:
    """The configuration that a fit writes names models that a server accepts, a bare classifier's too."""
    import yaml

    from evenkeel.models.black_box import BlackBox
    from evenkeel.serving.config import read_config

    out = tmp_path / "out"
    normalised = ["--scale", "0.01", "--mean", "1", "2", "3", "--std", "1", "2", "4"]
    result = run(folder, out, "--grid", "2,3", "--epochs", "1", *normalised)
    assert result.exit_code == 0, result.output
    settings = read_config(yaml.safe_load((out / "serve.yaml").read_text()), out)
    assert settings is not None
    bare = BlackBox.open(folder / "colours.onnx", scale=0.01, mean=(1, 2, 3), std=(1, 2, 4))
    carded = BlackBox.open(out / "colours.json")
    assert np.abs(bare.scores(PIXELS[:20]) - carded.scores(PIXELS[:20])).max() < 1e-2
    model = load_model(str(out / "colours.json"))
    nchw = PIXELS[:5].transpose(0, 3, 1, 2).astype(np.float32)
    assert np.abs(model.run(nchw) - bare.scores(PIXELS[:5])).max() < 1e-2


def test_networks_may_stay_in_floating_point(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--epochs", "0.1", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").notes["held_out_lost_to_int8"] is None
    graph = onnx.load(str(tmp_path / "out" / "colours-collage-3x3.onnx")).graph
    assert not any(node.op_type == "QuantizeLinear" for node in graph.node)


def test_more_images_are_learned_from_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    others = easy_pixels(300, 5)[0]
    np.savez(tmp_path / "others.npz", images=others)
    out = tmp_path / "out"
    more = ("--epochs", "6", "--more-images", str(tmp_path / "others.npz"), "--more-limit", "280")
    result = run(folder, out, *more)
    assert result.exit_code == 0, result.output
    card = load_card(out / "colours-collage-3x3.json")
    assert card.notes["trained_on"] == "600 images and 280 more in 4 views, scored by the classifier; no labels"
    assert card.accuracy is not None
    assert card.accuracy.sample_size == 99
    assert card.agreement is not None
    assert card.agreement.value > 0.7
    np.savez(tmp_path / "others.npz", images=others[::-1])
    result = run(folder, out, *more, "--resume")
    assert result.exit_code == 2
    assert "other images" in result.output


def test_images_to_learn_from_that_hold_the_test_images_are_refused(folder: Path, tmp_path: Path) -> None:
    same = str(folder / "unlabelled.npz")
    result = run(folder, tmp_path / "out", "--test-images", same, "--more-images", same)
    assert result.exit_code == 2
    assert "more-images: the test images would be among" in result.output
    result = run(folder, tmp_path / "out", "--more-images", str(folder / "images.npz"))
    assert result.exit_code == 2
    assert "more-images: they are among --images" in result.output
    for option, value in (("more-split", "train"), ("more-limit", "9")):
        result = run(folder, tmp_path / "out", f"--{option}", value)
        assert result.exit_code == 2
        assert f"{option}: it names a part of --more-images" in result.output


def test_labels_are_not_needed(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "out" / "cards.json"  # in a folder that is not there yet
    result = run(folder, tmp_path / "out", "--epochs", "1", "--json", str(document), images="unlabelled.npz")
    assert result.exit_code == 0, result.output
    assert json.loads(document.read_text())["arguments"]["epochs"] == 1
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.accuracy is None
    assert card.agreement is not None
    assert card.notes["calibrated_to"] == "the classifier's answers"


def test_test_images_are_measured_where_there_are_some(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", images=PIXELS[:90], labels=(LABELS[:90] + 1) % 10)  # all of them wrong
    result = run(folder, tmp_path / "out", "--epochs", "6", "--test-images", str(tmp_path / "test.npz"))
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.accuracy is not None
    assert card.agreement is not None
    assert card.accuracy.sample_size == 90
    assert "test images" in card.accuracy.how
    assert card.accuracy.value < 0.2 < card.agreement.value


def test_too_few_test_images_are_told_before_anything_is_scored(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", images=PIXELS[:8])
    result = run(folder, tmp_path / "out", "--test-images", str(tmp_path / "test.npz"))
    assert result.exit_code == 2
    assert "8 test images are too few: one collage of grid 3 shows 9" in result.output
    assert not (tmp_path / "out").exists()


def test_a_shared_network_is_trained_once(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--grid", "2,4", "--shared", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*.checkpoint"))) == 1
    cards = [load_card(tmp_path / "out" / f"colours-collage-{grid}x{grid}.json") for grid in (2, 4)]
    assert cards[0].parameters == cards[1].parameters


def test_an_interrupted_fit_resumes_to_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evenkeel.vision.fit import loop as fit_loop

    monkeypatch.setattr(fit_loop, "_CHECKPOINT_EVERY_S", -1.0)
    whole = run(folder, tmp_path / "whole", "--epochs", "1")
    assert whole.exit_code == 0, whole.output

    real, steps = fit_loop._step, 0

    def interrupted(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fit_loop, "_step", interrupted)
    stopped = run(folder, tmp_path / "parts", "--epochs", "1")
    assert stopped.exit_code == 1
    assert "--resume" in stopped.output
    monkeypatch.setattr(fit_loop, "_step", real)
    again = run(folder, tmp_path / "parts", "--epochs", "1")
    assert again.exit_code == 2
    assert "holds a fit already" in again.output
    resumed = run(folder, tmp_path / "parts", "--epochs", "1", "--resume")
    assert resumed.exit_code == 0, resumed.output
    names = [tmp_path / each / "colours-collage-3x3.onnx" for each in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_labels_are_counted_in_the_order_of_the_classifier(folder: Path, tmp_path: Path) -> None:
    """Folders are read in sorted order, which need not be the order of the classes that a card lists."""
    from PIL import Image

    from evenkeel.models.cards import ModelCard, save_card
    from evenkeel.vision.networks.export import file_sha256

    names = tuple("jihgfedcba")
    for number in range(620):
        place = tmp_path / "photos" / names[LABELS[number]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(place / f"{number}.png")
    (tmp_path / "colours.onnx").write_bytes((folder / "colours.onnx").read_bytes())
    sha256 = file_sha256(tmp_path / "colours.onnx")
    shape = {"height": 32, "width": 32, "layout": "NCHW", "datatype": "FP32", "normalisation_inside": False}
    graph = {"input_name": "x", "output_name": "y"}
    card = ModelCard("colours", "classifier", "colours.onnx", sha256, names, **shape, **graph)  # type: ignore[arg-type]
    save_card(card, tmp_path / "card.json")
    arguments = ["fit", "--classifier", str(tmp_path / "card.json"), "--images", str(tmp_path / "photos")]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--epochs", "6"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    fitted = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert fitted.classes == names
    assert fitted.accuracy is not None
    assert fitted.accuracy.value > 0.7


def test_a_fit_goes_on_from_the_weights_of_another(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "first", "--epochs", "6").exit_code == 0
    result = run(folder, tmp_path / "second", "--epochs", "0.1", "--rate", "0.01", "--start", str(tmp_path / "first"))
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "second" / "colours-collage-3x3.json")
    assert card.agreement is not None
    assert card.agreement.value > 0.7  # a tenth of an epoch teaches nothing
    assert card.notes["started_from_an_earlier_fit"]
    empty = run(folder, tmp_path / "third", "--epochs", "1", "--start", str(tmp_path))
    assert empty.exit_code == 2
    assert "no checkpoint of a network of this size" in empty.output


def test_a_step_has_as_many_tiles_as_are_wanted(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--epochs", "1", "--tiles", "20").exit_code == 0
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").notes["tiles_per_step"] == 20


def test_minutes_become_epochs(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--minutes", "0.02")
    assert result.exit_code == 0, result.output
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").notes["epochs"] >= 1


def test_a_training_ends_where_it_is_good_enough(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenkeel.vision.fit.loop._WATCHED_EVERY", 1)
    result = run(folder, tmp_path / "out", "--epochs", "20", "--until", "0.6", "--weights", "fresh")
    assert result.exit_code == 0, result.output
    assert "% of the held-out images, as --until wants" in result.output
    assert ", agrees " in result.output  # as it goes
    notes = load_card(tmp_path / "out" / "colours-collage-3x3.json").notes
    assert notes["stopped_at_agreement"] == 0.6
    done, wanted = notes["steps"]
    assert done < wanted
    assert notes["epochs"] < 20
    refused = run(folder, tmp_path / "other", "--until", "1.5")
    assert refused.exit_code == 2
    assert "a share above 0 and at most 1" in refused.output


def test_resuming_with_other_options_is_refused(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--epochs", "1").exit_code == 0
    result = run(folder, tmp_path / "out", "--epochs", "1", "--seed", "5", "--resume")
    assert result.exit_code == 2
    assert "another classifier, other images or other options" in result.output


def test_resuming_with_other_images_of_the_same_number_is_refused(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--epochs", "1").exit_code == 0
    others = PIXELS.copy()
    others[5, 0, 0, 0] ^= 1  # one value of one image
    np.savez(folder / "others.npz", images=others, labels=LABELS)
    result = run(folder, tmp_path / "out", "--epochs", "1", "--resume", images="others.npz")
    assert result.exit_code == 2
    assert "another classifier, other images or other options" in result.output


@pytest.mark.parametrize("name", ["scores.npy", "3x3.checkpoint", "plan.json"])
def test_resuming_from_a_damaged_file_names_it(folder: Path, tmp_path: Path, name: str) -> None:
    assert run(folder, tmp_path / "out", "--epochs", "1").exit_code == 0
    damaged = tmp_path / "out" / name
    damaged.write_bytes(damaged.read_bytes()[:-200])
    result = run(folder, tmp_path / "out", "--epochs", "1", "--resume")
    assert result.exit_code == 2
    assert f"{name} cannot be read" in result.output.replace("\n", "")
    damaged.unlink()
    if name != "plan.json":
        assert run(folder, tmp_path / "out", "--epochs", "1", "--resume").exit_code == 0


def test_a_document_that_cannot_be_written_is_refused_before_anything_is_scored(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--json", str(tmp_path / "gone" / "cards.json"))
    assert result.exit_code == 2
    assert "json: " in result.output
    assert "there is no folder" in result.output
    assert not (tmp_path / "out").exists()


def test_a_classifier_whose_card_would_be_the_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.onnx").write_bytes((folder / "colours.onnx").read_bytes())
    result = run(folder, tmp_path / "out", "--classifier", str(tmp_path / "plan.onnx"))
    assert result.exit_code == 2
    assert "its card would be plan.json" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "three"], "expected numbers like 3 or 2,3,4"),
        (["--grid", "3,3"], "different numbers from 1 to 8"),
        (["--grid", "9"], "different numbers from 1 to 8"),
        (["--cost", "0"], "cost: must be a number above zero"),
        (["--cost", "nan"], "cost: must be a number above zero"),
        (["--minutes", "-1"], "minutes: must be a number above zero"),
        (["--limit", "200"], "200 images are too few"),
        (["--seed", str(2**31)], "seed: must be from 0 to 2147483647"),
        (["--reach", "32"], "reach: must be below 32"),
        (["--tiles", "15"], "tiles: must be from 16 to 10000"),
        (["--tiles", "5000"], "tiles: one step would show 5,000"),
        (["--threads", "100000"], "threads: must be from 1 to"),
        (["--labels", "names"], "array 'names' is not there"),
        (["--test-split", "test"], "test images would be among those to learn from"),
        (["--split", "a", "--test-split", "a"], "test images would be among those to learn from"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run(folder, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_a_classifier_with_one_answer_is_refused(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "same.npz", images=PIXELS[LABELS == 3].repeat(12, axis=0))
    arguments = ["fit", "--classifier", str(folder / "colours.onnx"), "--images", str(tmp_path / "same.npz")]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out"), "--cost", "1e9"])
    assert result.exit_code == 2
    assert "gives class 3 for all" in result.output


def test_unreadable_images_are_named(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(620):
        place = tmp_path / "photos" / str(LABELS[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(place / f"{number}.png")
    (tmp_path / "photos" / "3" / "broken.png").write_bytes(b"no picture")
    arguments = ["fit", "--classifier", str(folder / "colours.onnx"), "--images", str(tmp_path / "photos")]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--epochs", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 could not be read" in result.output
    assert "broken.png" in result.output


def test_resuming_with_another_normalisation_is_refused(folder: Path, tmp_path: Path) -> None:
    """The scores that are kept are those of the pixels as they were prepared at first."""
    assert run(folder, tmp_path / "out", "--epochs", "0.1").exit_code == 0
    result = run(folder, tmp_path / "out", "--epochs", "0.1", "--resume", "--mean", "0.01", "0", "0")
    assert result.exit_code == 2
    assert "another classifier, other images or other options" in result.output


def test_resuming_what_is_done_keeps_what_its_card_says(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--epochs", "0.1").exit_code == 0
    checkpoint = tmp_path / "out" / "3x3.checkpoint"
    torch.save(torch.load(checkpoint) | {"seconds": 77.0}, checkpoint)
    assert run(folder, tmp_path / "out", "--epochs", "0.1", "--resume").exit_code == 0
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").notes["training_seconds"] == 77


def test_a_folder_in_which_another_fit_is_at_work_is_refused(folder: Path, tmp_path: Path) -> None:
    from evenkeel.vision.fit.lock import locked

    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        result = run(folder, out, "--epochs", "0.1")
    assert result.exit_code == 2
    assert f"{out} is in use by another fit" in result.output
    assert run(folder, out, "--epochs", "0.1").exit_code == 0


def test_free_cells_show_no_mirror_images_where_left_and_right_mean_something(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sides = random.integers(0, 2, 700)
    pixels = random.integers(0, 80, (700, 32, 32, 3))
    pixels[:, :, :16] += np.where(sides, 150, 0)[:, None, None, None]
    pixels[:, :, 16:] += np.where(sides, 0, 150)[:, None, None, None]
    weight = np.repeat([[100.0, -100.0], [-100.0, 100.0]], 16, axis=0).astype(np.float32) / 32  # which half is brighter
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["columns"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["columns", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "halves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        str(tmp_path / "halves.onnx"),
    )
    np.savez(tmp_path / "images.npz", images=pixels.astype(np.uint8))
    result = run(tmp_path, tmp_path / "out", "--classifier", str(tmp_path / "halves.onnx"), "--epochs", "3")
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "halves-collage-3x3.json")
    assert card.agreement is not None
    assert card.agreement.value > 0.9
    assert card.notes["held_out_gain_of_a_mirrored_look"] < 0
    assert not card.mirrored


def test_a_disk_that_is_full_at_the_end_loses_no_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from evenkeel.vision.fit import card as fit_card

    def full(*arguments: object) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = fit_card.write_onnx
    monkeypatch.setattr(fit_card, "write_onnx", full)
    result = run(folder, tmp_path / "out", "--epochs", "0.1")
    assert result.exit_code == 2
    assert "No space left on device; free some space and go on with --resume" in result.output
    monkeypatch.setattr(fit_card, "write_onnx", real)
    monkeypatch.setattr("evenkeel.vision.fit.loop._step", None)  # nothing is trained again
    assert run(folder, tmp_path / "out", "--epochs", "0.1", "--resume").exit_code == 0


def test_labels_that_are_none_of_the_classifier_can_be_left_away(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "dates.npz", images=PIXELS, labels=np.arange(700) % 12)
    arguments = ["fit", "--classifier", str(folder / "colours.onnx"), "--images", str(tmp_path / "dates.npz")]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--epochs", "0.1"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "labels go from 0 to 11, but the classifier has 10 classes" in refused.output
    assert "--labels none" in refused.output
    result = CliRunner().invoke(main, [*arguments, "--labels", "none"])
    assert result.exit_code == 0, result.output
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").accuracy is None


def test_names_that_look_like_markup_or_yaml_are_only_names(folder: Path, tmp_path: Path) -> None:
    import yaml
    from PIL import Image

    for number in range(520):
        place = tmp_path / "photos[" / str(LABELS[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(place / f"{number}.png")
    (tmp_path / "photos[" / "3" / "[").mkdir()
    (tmp_path / "photos[" / "3" / "[" / "red]broken.png").write_bytes(b"no picture")
    (tmp_path / "my: model #1.onnx").write_bytes((folder / "colours.onnx").read_bytes())
    arguments = ["fit", "--classifier", str(tmp_path / "my: model #1.onnx"), "--images", str(tmp_path / "photos[")]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path), "--cost", "1e9", "--epochs", "0.1"])
    assert result.exit_code == 0, result.output
    assert "3/[/red]broken.png: not an image file" in result.output
    settings = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    assert settings["model"] == "my: model #1.json"
    assert settings["codes"][1] == "my: model #1-collage-3x3.json"


def test_images_need_not_be_square(folder: Path, tmp_path: Path) -> None:
    """A tile shows the middle of an image, in training as in serving."""
    tall = np.zeros((600, 64, 32, 3), np.uint8)
    tall[:, 16:48] = PIXELS[:600]
    np.savez(tmp_path / "tall.npz", images=tall)
    model = onnx.load(str(folder / "colours.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
    onnx.save(model, str(tmp_path / "tall.onnx"))
    arguments = ["fit", "--classifier", str(tmp_path / "tall.onnx"), "--images", str(tmp_path / "tall.npz")]
    arguments += ["--scale", str(2 / 255), "--out", str(tmp_path / "out"), "--cost", "1e9", "--epochs", "6"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "tall-collage-3x3.json")
    assert card.agreement is not None
    assert card.agreement.value > 0.3  # a tenth by chance


def named(path: Path, names: list[str], some: list[int] | None = None) -> Path:
    """The images of the classes in `some` with the names of their classes as labels."""
    chosen = np.isin(LABELS, range(10) if some is None else some)
    repeated = 1 if some is None else 5
    pixels, labels = PIXELS[chosen].repeat(repeated, axis=0), LABELS[chosen].repeat(repeated)
    np.savez(path, images=pixels, labels=np.array(names)[labels])
    return path


def test_names_of_folders_in_another_order_are_served_for_their_own_classes(folder: Path, tmp_path: Path) -> None:
    names = list("jihgfedcba")  # sorted, they are in the opposite order
    images = named(tmp_path / "named.npz", names)
    result = run(folder, tmp_path / "out", "--epochs", "0.1", images=str(images))
    assert result.exit_code == 0, result.output
    assert "by the classifier's own answers" in result.output
    for name in ("colours", "colours-collage-3x3"):
        assert load_card(tmp_path / "out" / f"{name}.json").classes == tuple(names)
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").notes["calibrated_to"] == "labels"


def test_a_few_of_the_classes_are_found_among_them(folder: Path, tmp_path: Path) -> None:
    names = [f"kind {number}" for number in range(10)]
    images = named(tmp_path / "some.npz", names, [2, 5, 7])
    result = run(folder, tmp_path / "out", "--epochs", "2", images=str(images))
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "colours.json")
    assert [card.classes[number] for number in (0, 2, 5, 7)] == ["0", "kind 2", "kind 5", "kind 7"]
    fitted = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert fitted.accuracy is not None
    assert fitted.accuracy.value > 0.7
    assert card.temperature < 5


def test_labels_that_the_classifier_is_at_chance_on_calibrate_nothing(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mixed.npz", images=PIXELS, labels=np.random.default_rng(0).permutation(LABELS))
    result = run(folder, tmp_path / "out", "--epochs", "0.1", images=str(tmp_path / "mixed.npz"))
    assert result.exit_code == 0, result.output
    assert "the classifier itself is right for" in result.output
    assert "WARNING: that is near chance" in result.output
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.notes["calibrated_to"] == "the classifier's answers"
    assert load_card(tmp_path / "out" / "colours.json").temperature == 1.0


def test_a_file_names_the_classes_of_a_bare_classifier(folder: Path, tmp_path: Path) -> None:
    names = list("jihgfedcba")
    images = named(tmp_path / "named.npz", names, [1, 4])
    (tmp_path / "labels.txt").write_text("\n".join(names))
    result = run(
        folder, tmp_path / "out", "--epochs", "0.1", "--classes", str(tmp_path / "labels.txt"), images=str(images)
    )
    assert result.exit_code == 0, result.output
    assert "matched with the classifier's classes by name" in result.output
    assert load_card(tmp_path / "out" / "colours.json").classes == tuple(names)


def test_a_grey_classifier_of_open_size_with_odd_scores_is_fitted_and_served(folder: Path, tmp_path: Path) -> None:
    """No surgery on the graph is left to its owner."""
    grey = (MEANS @ np.array([0.299, 0.587, 0.114])).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["mean", "w", "b"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["z"]),
    ]
    weights = [
        numpy_helper.from_array(grey[None] / 20, "w"),
        numpy_helper.from_array(-(grey**2) / 40, "b"),
        numpy_helper.from_array(np.array([-1, 10, 1, 1]), "shape"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 1, "h", "w"])]
    outputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 10, 1, 1]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10]),
    ]
    graph = helper.make_graph(nodes, "grey", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "grey.onnx"))
    arguments = ["fit", "--classifier", str(tmp_path / "grey.onnx"), "--images", str(folder / "images.npz")]
    arguments += ["--out", str(tmp_path / "out"), "--cost", "1e9", "--epochs", "0.1", "--scale", "1", "--output", "z"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "give it with side" in result.output
    result = CliRunner().invoke(main, [*arguments, "--side", "32x32"])
    assert result.exit_code == 0, result.output
    model = load_model(str(tmp_path / "out" / "grey.json"))
    assert (model.run(PIXELS[:200]).argmax(1) == LABELS[:200]).mean() > 0.8
    for side in ("12y8", "7", "0x9"):
        assert CliRunner().invoke(main, [*arguments, "--side", side]).exit_code == 2


def test_what_the_classifier_answers_is_said_without_labels(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--epochs", "0.1", images="unlabelled.npz")
    assert "its answers to 100 held-out images: " in result.output
    assert "and 5 other classes" in result.output


def test_a_class_that_is_seen_too_seldom_to_be_held_out_is_something_to_learn(folder: Path, tmp_path: Path) -> None:
    """Whether there is anything to learn is decided by all images, not by the held-out ones."""
    pixels = PIXELS[LABELS == 3].repeat(12, axis=0)
    pixels[:5] = PIXELS[LABELS == 4][:5]
    np.savez(tmp_path / "rare.npz", images=pixels)
    result = run(folder, tmp_path / "out", "--epochs", "0.1", images=str(tmp_path / "rare.npz"))
    assert result.exit_code == 0, result.output


def test_test_images_that_are_learned_from_are_noticed(folder: Path, tmp_path: Path) -> None:
    """By their pixels, in whatever file they come; and so does a bench, by the card."""
    np.savez(tmp_path / "test.npz", images=PIXELS[:400], labels=LABELS[:400])
    test = ["--test-images", str(tmp_path / "test.npz")]
    result = run(folder, tmp_path / "out", "--epochs", "0.1", *test)
    assert result.exit_code == 0, result.output
    assert "test images are among those that are learned from" in result.output
    np.savez(tmp_path / "fresh.npz", images=easy_pixels(90, 5)[0])
    cards = ["--classifier", str(tmp_path / "out" / "colours.json")]
    cards += ["--collage", str(tmp_path / "out" / "colours-collage-3x3.json"), "--rounds", "0"]
    bench = CliRunner().invoke(main, ["bench", "fills", *cards, "--images", str(tmp_path / "test.npz")])
    assert "collage3x3 learned from these images" in bench.output
    bench = CliRunner().invoke(main, ["bench", "fills", *cards, "--images", str(tmp_path / "fresh.npz")])
    assert bench.exit_code == 0, bench.output
    assert "learned from" not in bench.output


def test_a_file_that_costs_more_than_it_may_is_said_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evenkeel.models import measure

    measured: list[float] = []

    def latencies(times: list[float]) -> None:
        def found(runs: object, rounds: int) -> list[float]:
            measured.append(times[min(len(measured), len(times) - 1)])
            return [1.0, measured[-1]]

        measured.clear()
        monkeypatch.setattr(measure, "interleaved_latencies_ms", found)

    latencies([0.7, 0.5, 0.55])  # the first was disturbed
    result = run(folder, tmp_path / "out", "--epochs", "0.1", "--cost", "1e9")
    assert result.exit_code == 0, result.output
    assert measured == [0.7]
    classifier_ms = [0.7e9, 0.5e9, 0.55e9]
    latencies([3 * each for each in classifier_ms])
    result = run(folder, tmp_path / "costly", "--epochs", "0.1", "--cost", "1e9")
    assert len(measured) == 3
    assert "WARNING: the file costs 1650000000.00 passes of the classifier, and --cost allows 1e+09" in result.output


def test_what_takes_long_says_how_far_it_is(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--epochs", "0.1")
    assert "reading images.npz: 700 of 700" in result.output
    assert "3x3: measuring sizes, at most: 3 of" in result.output


def rare(path: Path) -> Path:
    """Images of which the classifier gives 24 in 25 one class, and the others another."""
    common, other = PIXELS[LABELS == 3].repeat(20, axis=0)[:1200], PIXELS[LABELS == 4][:50]
    np.savez(path, images=np.concatenate([common, other]))
    return path


def test_rare_classes_are_told_apart_and_not_filled_wrongly(folder: Path, tmp_path: Path) -> None:
    """A network that has learned nothing says the largest class, and agrees in 96 %."""
    result = run(
        folder,
        tmp_path / "out",
        "--epochs",
        "0.1",
        "--held-out",
        "400",
        "--weights",
        "fresh",
        images=str(rare(tmp_path / "r.npz")),
    )
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.largest_class_share is not None
    assert card.agreement is not None
    assert card.agreement_elsewhere is not None
    assert card.largest_class_share == pytest.approx(0.96, abs=0.03)
    assert card.agreement.value > 0.9 > card.agreement_elsewhere.value
    assert {row[0] for row in card.notes["agreement_by_class"]} == {"3", "4"}
    shares, least, agrees = zip(*card.notes["agreement_of_surest"], strict=True)
    assert shares == (0.9, 0.7, 0.5)
    assert least == tuple(sorted(least))
    assert f"{agrees[1]:.1%} of the surest 70% (from {least[1]:.2f} on)" in result.output
    assert card.min_confidence > 0
    assert card.notes["above_min_confidence"]["elsewhere_filled_wrongly"] <= 3
    assert "3 is 9" in result.output
    assert "lowest by class: 4 " in result.output
    assert "since rare classes would be filled wrongly" in result.output or "lets no fill through" in result.output
    assert "always saying 3 would agree" in result.output
    assert Collage.from_card(card).min_confidence == card.min_confidence


def test_a_rare_class_that_was_learned_is_filled(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--epochs", "8", "--held-out", "400", images=str(rare(tmp_path / "r.npz")))
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.agreement_elsewhere is not None
    assert card.agreement_elsewhere.value > 0.8
    assert card.min_confidence == 0
    assert "WARNING" not in result.output


@pytest.mark.parametrize(
    ("fed", "better"),
    [
        (["--scale", "1"], "pixels of 0..1 and red first"),
        (["--bgr"], "pixels of 0..1 and red first"),
        (["--mean", "0.485", "0.456", "0.406"], "pixels of 0..1 and red first"),
        (["--scale", "1", "--bgr"], "pixels of 0..1 and red first"),
        ([], None),
    ],
)
def test_a_classifier_that_is_fed_wrongly_is_noticed(
    folder: Path, tmp_path: Path, fed: list[str], better: str | None
) -> None:
    names = tuple("jihgfedcba")
    (tmp_path / "labels.txt").write_text("\n".join(names))
    images = named(tmp_path / "named.npz", list(names))
    classes = ["--classes", str(tmp_path / "labels.txt")]
    result = run(folder, tmp_path / "out", "--epochs", "0.1", *classes, *fed, images=str(images))
    if better is None:
        assert "WARNING: fed" not in result.output
    else:
        assert f"WARNING: fed with {better} the classifier is right for 100% of 100 labelled images" in result.output


def test_tiles_are_read_by_the_classifiers_own_weights_where_they_agree_more(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "3x3: agreement after a short training each: the classifier's own weights, tiles of 32 pixels: 100.0%; " in (
        result.output
    )
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.notes["weights_began_as"] == "the classifier's own"
    assert card.agreement is not None
    assert card.agreement.value > 0.98
    again = run(folder, tmp_path / "out", "--epochs", "1", "--resume")
    assert again.exit_code == 0, again.output
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").sha256 == card.sha256


def test_a_classifier_that_knows_nothing_at_the_side_of_a_tile_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 64x64 and answers by sums over all pixels: of a quarter of them nothing is left behind its ReLU."""
    from evenkeel.vision.fit import fit as fit_module
    from evenkeel.vision.fit.size import Size

    least = 64 * 64 * (PIXELS / 255).mean((1, 2)).min(0) * 0.9
    weights = {
        "least": least.astype(np.float32),
        "w": ((MEANS / 255).T / 4096 * 400).astype(np.float32),
        "b": (-((MEANS / 255) ** 2).sum(1) / 2 * 400 + (MEANS / 255) @ least / 4096 * 400).astype(np.float32),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "least"], ["above"]),
        helper.make_node("Relu", ["above"], ["r"]),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "colours.onnx"))
    (tmp_path / "images.npz").write_bytes((folder / "images.npz").read_bytes())
    monkeypatch.setattr(fit_module, "choose_own_side", lambda *given: (Size((), 32, own=True), 0.5))
    for weights_from, instead in (
        ("auto", "it goes on only if it agrees more"),
        ("classifier", "trained all the same"),
    ):
        out = tmp_path / weights_from
        result = run(tmp_path, out, "--epochs", "0.2", "--weights", weights_from)
        assert result.exit_code == 0, result.output
        assert "the classifier's own weights, tiles of 32 pixels: untrained, it agrees" in result.output
        assert "with what such a tile shows of an image, enlarged to full size, it keeps" in " ".join(
            result.output.split()
        )
        assert "WARNING: with tiles of 32 pixels the classifier gives class" in result.output
        assert instead in result.output
        compared = load_card(out / "colours-collage-3x3.json").notes["agreement_when_compared"]
        assert len(compared) == (2 if weights_from == "auto" else 0)


def test_late_blocks_of_the_classifier_are_left_out_where_that_agrees_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost is chosen so that only without its blocks the classifier sees more than every second pixel."""
    from evenkeel.vision.fit import fit as fit_module, size as size_module

    model = onnx.load(str(folder / "colours.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 64
    first = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    model.graph.initializer.extend([numpy_helper.from_array(first, "f"), numpy_helper.from_array(0 * first, "z")])
    head = list(model.graph.node)
    head[0].input[0] = "at 2"
    blocks = [helper.make_node("Conv", ["x", "f"], ["at 0"])]
    for number in (0, 1):
        blocks.append(helper.make_node("Conv", [f"at {number}", "z"], [f"branch {number}"]))
        blocks.append(helper.make_node("Add", [f"at {number}", f"branch {number}"], [f"at {number + 1}"]))
    del model.graph.node[:]
    model.graph.node.extend([*blocks, *head])
    onnx.save(model, str(tmp_path / "colours.onnx"))
    (tmp_path / "images.npz").write_bytes((folder / "images.npz").read_bytes())

    def cost(run: object, network: torch.nn.Module, side: int, grid: int, *_: object) -> float:
        return 1e9 * (side / 39) ** 2 * (1 - 0.25 * network.graph.left_out)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(size_module, "_cost_of", cost)
    tried: list[size_module.Size] = []

    def agrees(run: object, size: size_module.Size, *_: object) -> float:
        tried.append(size)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return 0.5 + 0.1 * size.left_out

    monkeypatch.setattr(fit_module._FitRun, "_tried", agrees)
    stopped = run(tmp_path, tmp_path / "out", "--epochs", "1", "--weights", "classifier")
    assert "go on with the same command and --resume" in stopped.output
    result = run(tmp_path, tmp_path / "out", "--epochs", "1", "--weights", "classifier", "--resume")
    assert result.exit_code == 0, result.output
    assert [(size.side, size.left_out) for size in tried] == [(36, 0), (44, 1), (44, 1), (52, 2)]
    card = load_card(tmp_path / "out" / "colours-collage-3x3.json")
    assert card.notes["residual_blocks_left_out"] == 2
    assert card.notes["size"] == "the classifier's own weights without its last 2 residual blocks, tiles of 52 pixels"
    assert card.notes["agreement_when_compared"][card.notes["size"]] == 0.7
    assert card.agreement is not None
    assert card.agreement.value > 0.95
    # Going on: with the same blocks left out, without a comparison.
    again = run(tmp_path, tmp_path / "out", "--epochs", "1", "--weights", "classifier", "--resume")
    assert again.exit_code == 0, again.output
    assert load_card(tmp_path / "out" / "colours-collage-3x3.json").sha256 == card.sha256
    more = run(tmp_path, tmp_path / "more", "--epochs", "0.1", "--start", str(tmp_path / "out"))
    assert more.exit_code == 0, more.output
    assert load_card(tmp_path / "more" / "colours-collage-3x3.json").notes["residual_blocks_left_out"] == 2
    assert len(tried) == 4


def test_a_classifier_that_cannot_be_trained_is_fitted_with_fresh_weights_and_the_reason_is_said(
    folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(str(folder / "colours.onnx"))
    model.graph.node[1].output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.arange(10, dtype=np.int64)[None].repeat(1, 0), "order"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 10), np.float32), "nothing"))
    model.graph.node.append(helper.make_node("ScatterElements", ["nothing", "order", "before"], ["y"], axis=1))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(tmp_path / "colours.onnx"))
    for name in ("images.npz",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    result = run(tmp_path, tmp_path / "out", "--epochs", "0.1")
    assert result.exit_code == 0, result.output
    assert "3x3: fresh weights, since " in result.output
    assert "operators that evenkeel cannot train: ScatterElements" in result.output
    refused = run(tmp_path, tmp_path / "other", "--epochs", "0.1", "--weights", "classifier")
    assert refused.exit_code == 2
    assert "ScatterElements" in refused.output


def test_images_smaller_than_a_tile_are_pointed_out(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", images=PIXELS[:, ::2, ::2], labels=LABELS)
    small = run(folder, tmp_path / "small", "--grid", "2", "--epochs", "1", images=str(tmp_path / "small.npz"))
    assert small.exit_code == 0, small.output
    assert "no larger than 16 pixels along their shorter side, and a tile has 32" in " ".join(small.output.split())
    whole = run(folder, tmp_path / "whole", "--grid", "2", "--epochs", "1")
    assert "along their shorter side" not in whole.output
