"""Finds the files of the models and images that come with the package. Loads neither torch nor ONNX Runtime."""

from pathlib import Path

from evenkeel.errors import ConfigurationError

__all__ = ["CERTIFICATE", "COLLAGES", "IMAGES", "MISSES", "NAMES", "PROMISED", "card_path", "model_path"]

_HERE = Path(__file__).parent
COLLAGES = ("cifar10-collage-2x2", "cifar10-collage-3x3", "cifar10-collage-4x4")
NAMES = ("cifar10-base", "cifar10-light", *COLLAGES)
IMAGES = _HERE / "cifar10_test_400.npz"  # `images` uint8 [400, 32, 32, 3] and `labels` int64 [400]

CERTIFICATE = _HERE / "cifar10-light.certificate.json"  # of cifar10-light in front of cifar10-base
PROMISED = 0.93  # accuracy that it keeps, the least of several; the next leaves room for
MISSES = 0.0025  # of the answers to be degraded


def model_path(name: str) -> Path:
    """Gives the ONNX file of the shipped model `name`; its card is `card_path(name)`."""
    return _known(name).with_suffix(".onnx")


def card_path(name: str) -> Path:
    """Gives the card of the shipped model `name`."""
    return _known(name).with_suffix(".json")


def _known(name: str) -> Path:
    if name not in NAMES:
        raise ConfigurationError(f"no shipped model {name!r}; there are {', '.join(NAMES)}")
    return _HERE / name
