"""The example of an ordinary classifier: it trains, goes on where it was, and its file is one that `fit` takes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from evenkeel.models.black_box import BlackBox
from fit_helpers import easy_pixels

EXAMPLE = Path(__file__).parents[3] / "examples" / "resnet18.py"


def test_it_trains_and_its_file_is_taken(tmp_path: Path) -> None:
    pixels, labels = easy_pixels(230, 0)
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    out = tmp_path / "resnet18.onnx"
    command = [sys.executable, str(EXAMPLE), "--images", str(tmp_path / "images.npz"), "--side", "32"]
    command += ["--out", str(out), "--threads", "1", "--rate", "0.05", "--epochs"]

    def train(epochs: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [*command, epochs], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        return ended.stdout

    assert "step 0 of 1" in train("1")
    again = train("2")
    assert "step 0 of" not in again  # it went on
    assert "of 23 test images" in again
    classifier = BlackBox.open(str(out), threads=1)
    assert (classifier.classes, classifier.height, classifier.width) == (10, 32, 32)
    assert np.isfinite(classifier.scores(pixels[:50])).all()
