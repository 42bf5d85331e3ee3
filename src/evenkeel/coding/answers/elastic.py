"""Chooses the code that fits the number of items that wait."""

from collections.abc import Iterable

from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.errors import ConfigurationError

__all__ = ["Elastic"]


class Elastic:
    """Holds codes in the order of how many items they hold, e.g. 1x1, 2x2 and 3x3.

    Smaller grids give better answers, so the smallest that holds everything is right.

    Attributes:
        codes: the codes, smallest first.
        max_items: how many items the largest holds.
    """

    def __init__(self, codes: Iterable[BackupCode]) -> None:
        self.codes = tuple(sorted(codes, key=lambda code: code.max_items))
        if not self.codes:
            raise ConfigurationError("an elastic backup needs at least one code")
        for smaller, larger in zip(self.codes, self.codes[1:], strict=False):
            if smaller.max_items == larger.max_items:
                raise ConfigurationError(
                    f"codes {smaller.name!r} and {larger.name!r} both hold {larger.max_items} items; give one of them"
                )
        self.max_items = self.codes[-1].max_items

    def choose(self, waiting: int) -> BackupCode:
        """Gives the smallest code that holds `waiting` items, else the largest."""
        return next((code for code in self.codes if code.max_items >= waiting), self.codes[-1])
