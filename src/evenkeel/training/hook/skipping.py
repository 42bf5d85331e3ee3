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
    """Finds the parameters of `model` whose name fits one of `patterns`, e.g. `"*embed*"`; for `HookState(skip=...)`.

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


class Listed:
    """Skips the parameters of a list of modules and parameters, and those of few dimensions besides."""

    def __init__(self, entries: Iterable["nn.Module | Tensor"]) -> None:
        self._listed = list(entries)
        self._open()

    def __getstate__(self) -> list["nn.Module | Tensor"]:
        return self._listed

    def __setstate__(self, listed: list["nn.Module | Tensor"]) -> None:
        self._listed = listed
        self._entries: list[
            tuple[nn.Module | Tensor, list[Tensor]]
        ] = []  # a module of a copy may not have its parameters yet
        self._chosen: set[int] = set()

    def __call__(self, parameter: Tensor) -> bool:
        if not self._entries:
            self._open()
        return id(parameter) in self._chosen or few_dimensions(parameter)

    def check(self, averaged: Iterable[Tensor]) -> None:
        """Raises a ConfigurationError if an entry has parameters, but none of those that are `averaged`."""
        self._open()
        known = {id(parameter) for parameter in averaged}
        for entry, parameters in self._entries:
            if parameters and known.isdisjoint(map(id, parameters)):
                what = type(entry).__name__ if isinstance(entry, nn.Module) else f"parameter of {tuple(entry.shape)}"
                raise ConfigurationError(
                    f"skip lists a {what} that DistributedDataParallel does not average: it is frozen, or of another "
                    "model, or of this one before it was copied or converted; take it out, or list what is in the model"
                )

    def _open(self) -> None:
        # All are kept, so that no other parameter gets their ids.
        self._entries = [
            (each, list(each.parameters()) if isinstance(each, nn.Module) else [each]) for each in self._listed
        ]
        self._chosen = {id(parameter) for _, parameters in self._entries for parameter in parameters}


def skip_rule(skip: Skip) -> Callable[[Tensor], bool]:
    """Makes the rule of `skip`: none, a rule itself, or modules and parameters besides those of few dimensions.

    Raises:
        ConfigurationError: neither.
    """
    if skip is None:
        return _no_parameter
    if callable(skip) and not isinstance(skip, nn.Module | type):
        return skip
    # Texts, classes and some modules can be gone through too, but are one entry.
    alone = isinstance(skip, nn.Module | Tensor | str | type)
    entries: Iterable[object] = [skip] if alone or not isinstance(skip, Iterable) else skip
    listed: list[nn.Module | Tensor] = []
    for entry in entries:
        if not isinstance(entry, nn.Module | Tensor):
            raise _no_rule(entry)
        listed.append(entry)
    return Listed(listed)


def _no_parameter(parameter: Tensor) -> bool:
    return False


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
