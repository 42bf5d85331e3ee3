"""Names answer codes in text: `replicate`, `cheap:k=3`, `collage:grid=3`, `parity:form=concat,k=2`, `berrut:k=8`.

A text holds the settings that are a code's own. How scores are read and which model runs come from model cards, so a
text becomes settings first (`settings_of`), and the settings make a code when the cards are read. A setting that the
card holds too, such as a collage's grid, may be left out; if it is there, it must agree with the card.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.berrut import Berrut
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.parity import ConcatEncoder, Parity, ParityEncoder, SumEncoder
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.coding.checks import whole
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import Encoder, Layout, ModelCard, ModelKind
from evenkeel.text_values import read_count, read_truth, split_spec, unknown

__all__ = [
    "CODES",
    "BerrutSettings",
    "CascadeSettings",
    "CheapSettings",
    "CodeSettings",
    "CollageSettings",
    "OwnModel",
    "ParitySettings",
    "ReplicateSettings",
    "settings_of",
]

_MAX_CHARACTERS = 200  # of a text
_MAX_ITEMS = 1024
_MAX_GRID = 32
_MAX_SPARES = 64


@dataclass(frozen=True)
class OwnModel:
    """Says what codes need to know of the replicas' own model.

    Attributes:
        name: of the model.
        scores: how its scores are read.
        layout: of the items.
    """

    name: str
    scores: ScoreForm
    layout: Layout


@dataclass(frozen=True)
class CodeSettings(ABC):
    """Holds the settings of one code; `str()` gives the text, which leaves out what is the default.

    Attributes:
        name: of the code in text.
        card_kind: kind of the card that the code's model has; None where the code runs the replicas' own model.
    """

    name: ClassVar[str]
    card_kind: ClassVar[ModelKind | None] = None

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = [field.name for field in fields(self) if values[field.name] != field.default]
        given = [f"{setting}={_written(values[setting])}" for setting in changed]
        return f"{self.name}:{','.join(given)}" if given else self.name

    @abstractmethod
    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code.

        Args:
            own: the replicas' own model.
            card: of the model that runs the spare tasks, where that is another one.

        Raises:
            ConfigurationError: the card is missing, is of another kind, or contradicts the settings.
        """

    def _no_card(self, card: ModelCard | None) -> None:
        if card is not None:
            raise ConfigurationError(
                f"{self.name} runs the replicas' own model, so it takes no card; found {card.name!r}"
            )

    def _card(self, card: ModelCard | None) -> ModelCard:
        if card is None:
            raise ConfigurationError(f"{self.name} needs the card of a {self.card_kind}")
        if card.kind != self.card_kind:
            raise ConfigurationError(
                f"{self.name} needs the card of a {self.card_kind}, but {card.name} is a {card.kind}"
            )
        return card


@dataclass(frozen=True)
class ReplicateSettings(CodeSettings):
    """Names copies of `k` items in a group, each run `copies` times by the replicas' own model."""

    name = "replicate"
    k: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        whole("k", self.k, 1, _MAX_ITEMS)
        whole("copies", self.copies, 1, _MAX_SPARES)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        self._no_card(card)
        return Replicate(own.scores, model=own.name, copies=self.copies, max_items=self.k)


@dataclass(frozen=True)
class CheapSettings(CodeSettings):
    """Names a small classifier that runs `k` items in a pass."""

    name = "cheap"
    card_kind = "classifier"
    k: int = 1

    def __post_init__(self) -> None:
        """Checks the range."""
        whole("k", self.k, 1, _MAX_ITEMS)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        card = self._card(card)
        return Cheap(self.k, ScoreForm.from_card(card), model=card.name)


@dataclass(frozen=True)
class CascadeSettings(CodeSettings):
    """Names a light classifier that is asked first, up to `k` items in a pass."""

    name = "cascade"
    card_kind = "classifier"
    k: int = 8

    def __post_init__(self) -> None:
        """Checks the range."""
        whole("k", self.k, 1, _MAX_ITEMS)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        card = self._card(card)
        return Cascade(self.k, ScoreForm.from_card(card), model=card.name)


@dataclass(frozen=True)
class CollageSettings(CodeSettings):
    """Names a Collage-CNN of `grid` x `grid` boxes; None: as its card says."""

    name = "collage"
    card_kind = "collage"
    grid: int | None = None

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.grid is not None:
            whole("grid", self.grid, 1, _MAX_GRID)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        card = self._card(card)
        _agree(card, "grid", self.grid, card.grid)
        return Collage.from_card(card, own.layout)


@dataclass(frozen=True)
class ParitySettings(CodeSettings):
    """Names a parity model (ParM) for `k` items that are encoded as `form`; None: as its card says."""

    name = "parity"
    card_kind = "parity"
    form: Encoder | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.form not in (None, *get_args(Encoder)):
            raise unknown("form", str(self.form), get_args(Encoder))
        if self.k is not None:
            whole("k", self.k, 1, _MAX_ITEMS)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        card = self._card(card)
        _agree(card, "form", self.form, card.encoder)
        _agree(card, "k", self.k, card.group)
        if card.scores != own.scores.kind:
            raise ConfigurationError(f"{card.name} gives sums of {card.scores}, but {own.name} gives {own.scores.kind}")
        pixels = Pixels.from_card(card, own.layout)
        encoder: ParityEncoder
        if card.encoder == "sum":
            encoder = SumEncoder(card.group, pixels)
        else:
            encoder = ConcatEncoder(card.group, card.height, card.width, pixels)
        return Parity(encoder, ScoreForm.from_card(card), model=card.name)


@dataclass(frozen=True)
class BerrutSettings(CodeSettings):
    """Names Berrut's interpolation (ApproxIFER) of `k` items with `spares` more tasks for the replicas' own model."""

    name = "berrut"
    k: int = 1
    spares: int = 1
    systematic: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        whole("k", self.k, 1, _MAX_ITEMS)
        whole("spares", self.spares, 1, _MAX_SPARES)

    def code(self, own: OwnModel, card: ModelCard | None = None) -> BackupCode:
        """Makes the code."""
        self._no_card(card)
        return Berrut(self.k, own.scores, spares=self.spares, systematic=self.systematic, model=own.name)


CODES: Mapping[str, type[CodeSettings]] = {
    kind.name: kind
    for kind in (ReplicateSettings, CheapSettings, CascadeSettings, CollageSettings, ParitySettings, BerrutSettings)
}


def settings_of(text: str) -> CodeSettings:
    """Reads the settings that a text names.

    Raises:
        ConfigurationError: there is no such code or setting, a value that it cannot have, or the text is too long.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigurationError(
            f"code {text[:20] + '...'!r}: a name has at most {_MAX_CHARACTERS} characters, found {len(text)}"
        )
    name, given = split_spec(text, "code")
    if name not in CODES:
        raise unknown("code", name, list(CODES))
    readers = {field.name: _reader(field.type) for field in fields(CODES[name])}
    for setting in given:
        if setting not in readers:
            raise unknown(f"code {text!r}: setting", setting, list(readers))
    try:
        return CODES[name](**{setting: readers[setting](value, setting) for setting, value in given.items()})
    except ConfigurationError as error:
        raise ConfigurationError(f"code {text!r}: {error}") from error


def _reader(hint: Any) -> Callable[[str, str], Any]:
    kinds = {hint, *get_args(hint)}
    if bool in kinds:
        return read_truth
    return read_count if int in kinds else lambda text, field: text


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _agree(card: ModelCard, setting: str, wanted: object, found: object) -> None:
    """Refuses a setting that the card contradicts."""
    if wanted not in (None, found):
        raise ConfigurationError(f"{card.name} is for {setting}={found}, not {setting}={wanted}")
