"""What the SAEs of a sweep are called, and which of them belong together: read off their configs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae.architectures.config import SAEConfig
from sae.train.config import TrainConfig


class SweepName(NamedTuple):
    """What an SAE is called among those of its sweep."""

    name: str
    """What tells it from every other: `topk-2048-k24`, and whatever else differs among those of that short name."""
    family: str
    """All of its config but how sparse it is made, and its seed: `topk 2,048`, and as many settings more as tell it
    from the other families."""
    sparsity: str
    """How sparse it is made: `k 24`, `l1 0.5`. SAEs of one family and sparsity differ in their seeds alone."""


def name_sweep(configs: Sequence[TrainConfig]) -> list[SweepName]:
    """Names of the SAEs of one sweep.

    Args:
        configs: with their hook points spelled out; no two are the same.
    """
    several = len({config.hook_point for config in configs}) > 1
    settings: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    choices: dict[tuple[str | None, str], dict[str, dict[str, Any]]] = {}
    for config in configs:
        settings.setdefault((config.hook_point, _short_name(config)), []).append(_settings(config))
        choices.setdefault((config.hook_point, _title(config)), {})[_recipe(config)] = _choices(config)
    named = []
    for config in configs:
        where, name, title = config.hook_point, _short_name(config), _title(config)
        words = _telling_apart(_choices(config), list(choices[where, title].values()))
        differing = [
            f"{setting}{_shown(value)}"
            for setting, value in _settings(config).items()
            if any(other[setting] != value for other in settings[where, name])
        ]
        named.append(
            SweepName(
                "-".join([*([str(where)] if several else []), name, *differing]),
                ", ".join([title, *words, *([str(where)] if several else [])]),
                " ".join(_sparsity(config.sae)),
            )
        )
    return named


def _short_name(config: TrainConfig) -> str:
    setting, value = _sparsity(config.sae)
    dash = "-" if setting[-1].isdigit() else ""
    return f"{config.sae.architecture}-{config.sae.d_sae}-{setting}{dash}{value}"


def _title(config: TrainConfig) -> str:
    return f"{config.sae.architecture} {config.sae.d_sae:,}"


def _sparsity(sae: SAEConfig) -> tuple[str, str]:
    """The setting that makes it sparse, in short, and its value."""
    return sae.sparsity.removesuffix("_coefficient"), _shown(getattr(sae, sae.sparsity))


def _recipe(config: TrainConfig) -> str:
    """What all of a family have in common."""
    return config.model_dump_json(exclude={"seed": True, "sae": {config.sae.sparsity}})


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What may differ among SAEs of one hook point, the seed last."""
    return config.model_dump(exclude={"hook_point", "seed", "sae"}) | config.sae.model_dump() | {"seed": config.seed}


def _choices(config: TrainConfig) -> dict[str, Any]:
    """What may differ among families: the SAE's own settings first, and words before numbers, which say less."""
    own = config.sae.model_dump()
    values = {name: value for name, value in _settings(config).items() if name not in ("seed", config.sae.sparsity)}
    return dict(sorted(values.items(), key=lambda item: (not isinstance(item[1], str), item[0] not in own)))


def _telling_apart(mine: Mapping[str, Any], others: list[dict[str, Any]]) -> list[str]:
    """The first settings that together tell one family from all others: `decoder free`."""
    words = []
    for setting, value in mine.items():
        like_it = [other for other in others if other[setting] == value]
        if len(like_it) < len(others):
            words.append(f"{setting} {_shown(value)}")
        others = like_it
    return words


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, dict | list | tuple):
        return "-".join(map(_shown, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)
