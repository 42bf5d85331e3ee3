"""Classifiers of images that are not square: nothing that they look at is cut off their tiles."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from evenkeel.backends.worker.model import load_model
from evenkeel.cli.main import main
from evenkeel.coding.answers.collage import Collage
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card

HEIGHT, WIDTH, LAMP = 96, 32, 24
CLASSES = 3  # the upper end is lit, the lower end, or neither


def lights(count: int, seed: int) -> np.ndarray:
    """Traffic lights on noise: of the four lamps only those at both ends matter, and no middle square shows them."""
    random = np.random.default_rng(seed)
    pixels = random.integers(20, 90, (count, HEIGHT, WIDTH, 3)).astype(np.uint8)
    for image, kind in zip(pixels, random.integers(0, CLASSES, count), strict=True):
        for place, lit in ((0, kind == 0), (3, kind == 1), (1, random.random() < 0.5), (2, random.random() < 0.5)):
            top = place * LAMP + 4 + random.integers(-2, 3)
            image[top : top + 16, 8:24] = (240, 230, 120) if lit else (50, 50, 50)
    return pixels


def write_classifier(path: Path) -> None:
    """Scores of the brightness of both ends."""
    nodes = [helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT)]
    for end in ("upper", "lower"):
        nodes += [
            helper.make_node("Slice", ["float", f"{end} first", f"{end} last", "rows"], [end]),
            helper.make_node("ReduceMean", [end], [f"{end} mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Unsqueeze", [f"{end} mean", "last axis"], [f"{end} column"]),
        ]
    nodes += [
        helper.make_node("Concat", ["upper column", "lower column"], ["both"], axis=1),
        helper.make_node("Gemm", ["both", "weights", "bias"], ["scores"]),
    ]
    constants = {"rows": [1], "last axis": [1], "upper first": [0], "upper last": [LAMP]}
    constants |= {"lower first": [HEIGHT - LAMP], "lower last": [HEIGHT]}
    tensors = [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in constants.items()]
    tensors += [numpy_helper.from_array(np.array([[0.2, 0, 0], [0, 0.2, 0]], np.float32), "weights")]
    tensors += [numpy_helper.from_array(np.array([0, 0, 18], np.float32), "bias")]
    graph = helper.make_graph(
        nodes,
        "lights",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def test_a_traffic_light_whose_ends_tell_its_class_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenkeel.models import measure
    from evenkeel.vision.fit import size

    monkeypatch.setattr(size, "_ROUNDS", 3)
    monkeypatch.setattr(measure, "LATENCY_ROUNDS", 3)
    monkeypatch.setattr(size, "sizes", lambda side, coarse=False, widest=128: [size.Size((16, 24, 32), side, coarse)])
    monkeypatch.setattr(size, "tile_sides", lambda height, width: [32])  # less than its 55 x 55 pixels, for speed
    write_classifier(tmp_path / "lights.onnx")
    np.savez(tmp_path / "images.npz", images=lights(1100, 0))
    np.savez(tmp_path / "test.npz", images=lights(400, 1))
    box = BlackBox.open(tmp_path / "lights.onnx")
    assert np.bincount(box.scores(lights(300, 2)).argmax(1)).min() > 60
    arguments = ["fit", "--classifier", str(tmp_path / "lights.onnx"), "--images", str(tmp_path / "images.npz")]
    arguments += ["--test-images", str(tmp_path / "test.npz"), "--out", str(tmp_path / "out"), "--grid", "2"]
    arguments += ["--cost", "1e9", "--epochs", "10", "--held-out", "100", "--views", "2", "--reach", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    card = load_card(tmp_path / "out" / "lights-collage-2x2.json")
    assert card.squeezed
    assert card.agreement is not None
    assert card.agreement.value > 0.95
    # What is served is what was fitted: the gateway's own code on the written file.
    code, model = Collage.from_card(card), load_model(str(tmp_path / "out" / "lights-collage-2x2.json"))
    items = list(lights(4, 3))
    reply = model.run(code.spares([code.prepare(item) for item in items])[0].inputs)
    answers = code.decode(4, {4: reply})
    wanted = box.scores(np.stack(items)).argmax(1)
    assert sum(int(answers[place].value.argmax()) == wanted[place] for place in range(4)) >= 3
