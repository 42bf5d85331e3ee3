"""Which parameters stay uncompressed."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from evenkeel.errors import ConfigurationError

__all__ = ["Skip", "few_dimensions", "named", "skip_rule"]

Skip = Callable[[Tensor], bool] | Iterable["nn.Module | Tensor"] | None


def few_dimensions(parameter: Tensor) -> bool:
    """True for biases and the gains of norms: less than two dimensions. They are small and their errors weigh much."""
    return int(parameter.ndim) < 2


def named(model: nn.Module, *patterns: str) -> list[Tensor]:
    """Parameters of `model` whose name fits one of `patterns`, e.g. `"*embed*"`; for `HookState(skip=...)`.

    Raises:
        ConfigurationError: a pattern that no parameter fits.
    """
    found: list[Tensor] = []
    for pattern in patterns:
        fitting = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigurationError(f"no parameter is called {pattern!r}; see model.named_parameters()")
        found += fitting
    return found


def skip_rule(skip: Skip) -> Callable[[Tensor], bool]:
    """The rule that `skip` stands for: none, a rule itself, or modules and parameters besides those of few dimensions.

    Raises:
        ConfigurationError: neither.
    """
    if skip is None:
        return lambda parameter: False
    if callable(skip) and not isinstance(skip, nn.Module):
        return skip
    listed: list[Tensor] = []
    for entry in [skip] if isinstance(skip, nn.Module | Tensor) else skip:
        if isinstance(entry, nn.Module):
            listed += entry.parameters()
        elif isinstance(entry, Tensor):
            listed.append(entry)
        else:
            raise ConfigurationError(
                f"skip takes a rule, or modules and parameters, found {entry!r}; "
                f"for names: skip=evenkeel.named(model, {entry!r})"
            )
    chosen = {id(parameter): parameter for parameter in listed}  # kept, so that no other parameter gets their ids
    return lambda parameter: id(parameter) in chosen or few_dimensions(parameter)
