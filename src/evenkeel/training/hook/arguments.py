"""Arguments of the hook's states that are of a wrong kind, refused where they are given."""

from evenkeel.errors import ConfigurationError

__all__ = ["check_kind", "check_loss_scale"]


def check_kind(name: str, value: object, fits: bool, wanted: str) -> None:
    """ConfigurationError naming `name` and what is `wanted`, unless `value` fits or is None."""
    if value is not None and not fits:
        raise ConfigurationError(f"{name} must be {wanted}, or None, found {value!r}")


def check_loss_scale(loss_scale: object) -> None:
    """ConfigurationError unless it is a function or None."""
    wanted = "a function that gives the loss scale of the step under way, such as scaler.get_scale without brackets"
    check_kind("loss_scale", loss_scale, callable(loss_scale), wanted)
