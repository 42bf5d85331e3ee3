"""Chooses the parameters that stay uncompressed."""

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
    if callable(skip) and not isinstance(skip, nn.Module | type):
        return skip
    # Texts, classes and some modules can be gone through too, but are one entry.
    alone = isinstance(skip, nn.Module | Tensor | str | type)
    entries: Iterable[object] = [skip] if alone or not isinstance(skip, Iterable) else skip
    listed: list[Tensor] = []
    for entry in entries:
        if isinstance(entry, nn.Module):
            listed += entry.parameters()
        elif isinstance(entry, Tensor):
            listed.append(entry)
        else:
            raise _no_rule(entry)
    chosen = {id(parameter): parameter for parameter in listed}  # kept, so that no other parameter gets their ids
    return lambda parameter: id(parameter) in chosen or few_dimensions(parameter)


def _no_rule(entry: object) -> ConfigurationError:
    if isinstance(entry, str):
        remedy = f"for names: skip=evenkeel.named(model, {f'*{entry}*'!r})"
    elif isinstance(entry, type):
        name = entry.__name__
        remedy = f"for all of a class: skip=[module for module in model.modules() if isinstance(module, {name})]"
    else:
        remedy = "such as skip=[model.embedding], or None to compress everything"
    return ConfigurationError(
        f"skip takes a rule (parameter -> bool), or modules and parameters, found {entry!r}; {remedy}"
    )
