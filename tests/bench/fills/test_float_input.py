import numpy as np
import onnxruntime
import pytest

from evenkeel.bench.fills.float_input import with_float_input
from evenkeel.errors import ConfigurationError
from evenkeel.models.shipped import model_path
from onnx_bytes import FLOAT, UINT8, linear_model

WEIGHTS = np.arange(6.0).reshape(3, 2)


def scores(content, rows):
    (found,) = onnxruntime.InferenceSession(content).run(None, {"images": rows})
    return found


def test_scores_stay_what_they_were_and_pixels_may_be_anything():
    content = linear_model(2, WEIGHTS, UINT8)
    changed = with_float_input(content, "images")
    assert changed == linear_model(2, WEIGHTS, FLOAT)
    rows = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3)).astype(np.uint8)
    np.testing.assert_array_equal(scores(content, rows), scores(changed, rows.astype(np.float32)))
    beyond = np.full((1, 2, 2, 3), -300.5, np.float32)
    np.testing.assert_allclose(scores(changed, beyond), -300.5 * WEIGHTS.sum(axis=0)[None], rtol=1e-5)


def test_the_shipped_classifier_can_be_changed():
    content = model_path("cifar10-base").read_bytes()
    rows = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    changed = with_float_input(content, "images")
    assert sum(a != b for a, b in zip(content, changed, strict=True)) == 1
    np.testing.assert_array_equal(scores(content, rows), scores(changed, rows.astype(np.float32)))


@pytest.mark.parametrize("content", [b"\x3a\xff", b"\xff\xff\xff", b"not a model at all", b"\x3a\x05\x5a\x7f"])
def test_what_is_no_model_is_refused(content):
    with pytest.raises(ConfigurationError, match=r"is not an ONNX model|has no input"):
        with_float_input(content, "images")


def test_an_input_that_is_not_there_or_float_already_is_refused():
    with pytest.raises(ConfigurationError, match="no input 'pixels' of uint8"):
        with_float_input(linear_model(2, WEIGHTS, UINT8), "pixels")
    with pytest.raises(ConfigurationError, match="no input 'images' of uint8"):
        with_float_input(linear_model(2, WEIGHTS, FLOAT), "images")
