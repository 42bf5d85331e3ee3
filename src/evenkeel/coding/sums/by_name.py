"""Names sum codes in text: `thc:bits=2`, `lowrank:rank=16+thc:block=512`, `ef+fixed:bits=8`.

A code is its name and those settings that are not its constructor's defaults. `+` puts what stands after it inside: a
projection's coefficients travel in the code behind it, and `ef` keeps what that code loses.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.error_feedback import ErrorFeedback
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.gradiveq import GradiVeQ
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.sums.plain_thc import PlainTHC
from evenkeel.coding.sums.thc import THC
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.text_values import read_count, read_fraction, split_spec, unknown

__all__ = ["CODES", "code_of", "text_of"]

CODES: Mapping[str, type[SumCode]] = {
    "fp32": Plain,
    "fixed": FixedPoint,
    "thc": THC,
    "plain-thc": PlainTHC,
    "lowrank": LowRank,
    "gradiveq": GradiVeQ,
    "ef": ErrorFeedback,
}
_INNER = ("inner", "code")  # parameters that are codes
_ATTRIBUTES = {"block": "granule", "code": "inner"}  # settings that a code keeps under another name


def code_of(text: str) -> SumCode:
    """Makes the code that a text names.

    Raises:
        ConfigurationError: there is no such code or setting, or a value that it cannot have.
    """
    *outer, innermost = text.split("+")
    code = _made(innermost, None)
    for part in reversed(outer):
        code = _made(part, code)
    return code


def text_of(code: SumCode) -> str:
    """Writes the text that names a code; `code_of` makes an equal one of it.

    Raises:
        ConfigurationError: the code is of a kind that has no name.
    """
    name = next((name for name, kind in CODES.items() if kind is type(code)), None)
    if name is None:
        raise ConfigurationError(f"code: {code!r} has no name; codes with a name are {', '.join(CODES)}")
    settings = {field: getattr(code, _ATTRIBUTES.get(field, field)) for field in _parameters(type(code))}
    for field in list(settings):  # what the constructor would take anyway need not be said
        fewer = {other: value for other, value in settings.items() if other != field}
        if _makes(type(code), fewer, code):
            settings = fewer
    inner = [text_of(settings.pop(field)) for field in _INNER if field in settings]
    fields = ",".join(f"{field}={_written(value)}" for field, value in settings.items())
    return "+".join([f"{name}:{fields}" if fields else name, *inner])


def _made(text: str, inside: SumCode | None) -> SumCode:
    """Makes one code around another one, if there is one."""
    name, fields = split_spec(text, "code")
    if name not in CODES:
        raise unknown("code", name, list(CODES))
    parameters = _parameters(CODES[name])
    inner = next((field for field in _INNER if field in parameters), None)
    for field in fields:
        if field not in parameters or field == inner:
            raise unknown(f"code {text!r}: setting", field, [each for each in parameters if each != inner] or ["none"])
    if inner is None and inside is not None:
        raise ConfigurationError(f"code {text!r}: {name} takes no code inside; put it behind, as in lowrank+{name}")
    if inner is not None and inside is None and parameters[inner].default is Parameter.empty:
        raise ConfigurationError(f"code {text!r}: say what code is inside {name}, as in {name}+thc")
    settings: dict[str, Any] = {} if inner is None or inside is None else {inner: inside}
    try:
        settings |= {field: _readers(CODES[name])[field](value, field) for field, value in fields.items()}
        return CODES[name](**settings)
    except (CodeError, ConfigurationError) as error:
        raise ConfigurationError(f"code {text!r}: {error}") from error


def _makes(kind: type[SumCode], settings: Mapping[str, Any], code: SumCode) -> bool:
    try:
        return repr(kind(**settings)) == repr(code)
    except (ConfigurationError, TypeError):  # other settings do not fit without the one left out, or it has no default
        return False


def _parameters(kind: type[SumCode]) -> dict[str, Parameter]:
    return dict(signature(kind).parameters)


def _readers(kind: type[SumCode]) -> dict[str, Callable[[str, str], Any]]:
    """Gives how each setting is read, by the type that the constructor says it has."""
    hints = get_type_hints(kind.__init__)
    return {field: _reader(hints[field]) for field in _parameters(kind) if field not in _INNER}


def _reader(hint: Any) -> Callable[[str, str], Any]:
    kinds = {hint, *get_args(hint)}
    if int in kinds:
        return read_count
    return read_fraction if float in kinds else lambda text, field: text


def _written(value: object) -> str:
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)
