"""An experiment with a user's own classifier and collages."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.bench.serving.command import _demo_delay
from evenkeel.bench.serving.measure import Experiment, parse_contender, run_all, server_config
from evenkeel.bench.serving.user_models import UserModels
from evenkeel.cli.main import main
from evenkeel.errors import ConfigurationError
from evenkeel.models import shipped
from evenkeel.serving.config import read_config


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A folder as a fit leaves it: the classifier's card and a configuration that names a collage beside it."""
    for name in ("cifar10-base", "cifar10-collage-3x3"):
        card = Path(shipped.card_path(name))
        for path in (card, card.with_suffix(".onnx")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    codes = "codes: [replicate, cifar10-collage-3x3.json]"
    (tmp_path / "serve.yaml").write_text(f"model: cifar10-base.json\n{codes}\nreplicas: 2\nbackups: 1\n")
    with np.load(shipped.IMAGES, allow_pickle=False) as arrays:
        np.savez(tmp_path / "images.npz", images=arrays["images"][:60])
    return tmp_path


def test_the_models_of_a_fit_are_what_is_served_and_compared_with_its_own_answers(fitted: Path) -> None:
    own = UserModels.read(fitted / "cifar10-base.json", fitted / "images.npz")
    assert own.images.shape == (60, 32, 32, 3)
    assert own.images.dtype == np.uint8
    assert own.answers.shape == (60,)
    with np.load(shipped.IMAGES, allow_pickle=False) as arrays:
        assert (own.answers == arrays["labels"][:60]).mean() > 0.8
    experiment = Experiment(own=own)
    raw = server_config(experiment, parse_contender("collage+hedge", experiment))
    assert raw["model"] == str(fitted / "cifar10-base.json")
    assert raw["codes"] == ["replicate", str(fitted / "cifar10-collage-3x3.json")]
    read_config(raw)  # a server takes it, in whatever folder
    assert own.held_back == ()


def test_fills_that_a_card_holds_back_are_told(fitted: Path) -> None:
    path = fitted / "cifar10-collage-3x3.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["min_confidence"] = 0.875
    path.write_text(json.dumps(card), encoding="utf-8")
    (told,) = UserModels.read(fitted / "cifar10-base.json", fitted / "images.npz").held_back
    assert told.startswith("cifar10-collage-3x3 fills only from confidence 0.88 on")


def test_a_slow_model_gets_slow_delays_so_that_its_passes_fit_on_the_machine(
    fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = UserModels.read(fitted / "cifar10-base.json", fitted / "images.npz")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for pass_ms, scale in ((1.0, 0.3), (50.0, 2.4)):
        object.__setattr__(own, "pass_ms", pass_ms)
        assert float(_demo_delay(0.4, own).partition("=")[2]) == pytest.approx(scale, abs=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "serve.yaml").unlink(), "no serve.yaml beside"),
        (lambda folder: (folder / "serve.yaml").write_text("model: cifar10-base.json\n"), "names no collage"),
        (lambda folder: (folder / "serve.yaml").write_text("codes: [\n"), "cannot be read"),
        (lambda folder: np.savez(folder / "images.npz", images=np.zeros((3, 32, 32, 3), np.uint8)), "holds 3; give 20"),
    ],
)
def test_what_is_missing_is_said(fitted: Path, change: object, message: str) -> None:
    change(fitted)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=message):
        UserModels.read(fitted / "cifar10-base.json", fitted / "images.npz")


def test_a_bare_model_or_half_of_the_two_options_is_refused(fitted: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no model card \(.json\)"):
        UserModels.read(fitted / "cifar10-base.onnx", fitted / "images.npz")
    result = CliRunner().invoke(main, ["demo", "--classifier", str(fitted / "cifar10-base.json")])
    assert result.exit_code == 2
    assert "--classifier and --images together" in result.output


def test_a_server_answers_with_them_as_they_answer_by_themselves(fitted: Path) -> None:
    own = UserModels.read(fitted / "cifar10-base.json", fitted / "images.npz")
    experiment = Experiment(own=own, requests=20, replicas=2, delay="constant:seconds=0.002", rate_per_s=50)
    runs = asyncio.run(run_all(experiment, [parse_contender("none", experiment)]))
    assert [record.truth for record in runs[0].records] == own.answers[:20].tolist()
    assert runs[0].row["accuracy"] == 1  # its answers are its own
    assert runs[0].row["failed"] == 0
