"""What may be asked of a Ray cluster."""

import pytest

from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.errors import ConfigurationError


def test_what_is_usual_is_taken() -> None:
    options = RayOptions(9, "auto", {"CPU": 1, "accelerator": 0.5}, "STRICT_SPREAD")
    assert (options.count, options.fleet, options.ship) == (9, "", True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "ray.count: expected a whole number from 1 to 4096, found 0"),
        ({"strategy": "NEAR"}, "strategy: must be PACK or SPREAD or STRICT_PACK or STRICT_SPREAD, found 'NEAR'"),
        ({"address": "ray://head:10001"}, "address: a gateway must be on a machine of the cluster"),
        ({"address": "two words"}, "address: expected auto, local or host:port"),
        ({"fleet": "a/b"}, "fleet: letters, digits and ._- make a name, found 'a/b'"),
        ({"fleet": "blue", "address": "local"}, "fleet: a cluster that ends with this gateway cannot be shared"),
        ({"resources": {}}, "resources: name at least one"),
        ({"resources": {"CPU": 0}}, "resources.CPU: expected a number above 0, found 0"),
        ({"resources": {"CPU": float("nan")}}, "resources.CPU: expected a number above 0, found nan"),
        ({"resources": {"cpu": 1}}, "resources.cpu: Ray's names are CPU, GPU and memory"),
        ({"runtime_env": {"pip": {1}}}, "runtime_env: .* not JSON serializable"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(wrong, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RayOptions(**{"count": 1, **wrong})
