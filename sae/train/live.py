"""What a person sees of a running sweep: one line."""

from collections.abc import Mapping, Sequence

MAX_EACH = 4
"""SAEs whose figures are shown one by one; of more the lowest and the highest are."""
FIGURES = {"fvu": ".3f", "l0": ".3g", "dead": ".0%", "loss": ".3g"}
"""How the figures of the curve are shown, the ones that matter most first: a narrow terminal cuts the end."""


def live_note(
    last: Sequence[Mapping[str, float]], tokens_per_second: float, waited_seconds: float | None = None
) -> str:
    """`52,100 tokens/s, waited 0.2 s for data; fvu 0.213 0.187; l0 24 32; dead 0% 3%; loss 0.21 0.19`

    Of more than MAX_EACH SAEs: `fvu 0.187 to 0.213`.

    Args:
        last: of every SAE the last point of its curve, means over the steps since the one before; empty before the
            first one.
        waited_seconds: how long training has stood still until rows were read. None: they are in memory.
    """
    waited = f", waited {waited_seconds:.1f} s for data" if waited_seconds is not None else ""
    parts = [f"{tokens_per_second:,.0f} tokens/s{waited}"]
    for name, form in FIGURES.items():
        values = [point[name] for point in last if point]
        if len(last) > MAX_EACH and values:
            parts.append(f"{name} {min(values):{form}} to {max(values):{form}}")
        else:
            parts.append(" ".join([name, *(format(point[name], form) if point else "-" for point in last)]))
    return "; ".join(parts)
