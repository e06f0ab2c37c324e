"""Options of the form NAME=NUMBER that change some of several given numbers."""

from collections.abc import Mapping, Sequence

from sae.errors import ConfigError


def named_numbers(
    option: str, given: Sequence[str], defaults: Mapping[str, float], unit: str = "NUMBER", *, zero: bool, what: str
) -> dict[str, float]:
    """The defaults with what was given in their place.

    Args:
        option, unit, what: as errors call the option, its values and one of them.
        zero: whether a number may be 0.

    Raises: ConfigError for a name that is none, what is no number, or one that is infinite or too small.
    """
    numbers = dict(defaults)
    for text in given:
        name, _, value = text.partition("=")
        if name not in numbers:
            raise ConfigError(f"{option} {text!r}: write NAME={unit} with one of {', '.join(numbers)}")
        try:
            number = float(value)
        except ValueError as err:
            raise ConfigError(f"{option} {text!r}: {value!r} is no number") from err
        if not (number >= 0 if zero else number > 0) or number == float("inf"):
            raise ConfigError(f"{option} {text!r}: {what} is {'0 or more' if zero else 'more than 0'}")
        numbers[name] = number
    return numbers
