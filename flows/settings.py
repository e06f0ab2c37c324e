"""Reading a run's configuration: recipes, files, `--set`; errors as one clear line."""

import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flows.recipes import RECIPES
from sae.errors import ConfigError
from sae.plan import PipelineConfig
from sae.train.grid import expand_grids

MAX_SHOWN = 80
"""Characters of a wrong value that a message repeats."""


def load_config(source: str, settings: list[str], root: str | None) -> PipelineConfig:
    """A recipe's or a file's config with `--set path=value` and `--root` applied.

    Args:
        source: a recipe's name, or the path of a .toml or .json file.
        settings: `path.to.field=value`; the value is JSON, or else a plain string.

    Raises: ConfigError, in one line that says what is wrong, where, and what is allowed.
    """
    data = _read(source)
    for setting in settings:
        _apply(data, setting)
    if root is not None:
        execution = data.setdefault("execution", {})
        if isinstance(execution, dict):  # whatever else it is, is refused below
            execution["root"] = root
    try:
        if "saes" in data:  # so that places in messages are places in `data`
            data["saes"] = expand_grids(data["saes"])
    except ValueError as err:
        raise ConfigError(f"{source}: {err}") from err
    try:
        return PipelineConfig.model_validate(data)
    except ValidationError as err:
        raise ConfigError(f"{source}: {explain(err, data)}") from err


def explain(error: ValidationError, data: Any) -> str:
    """The first problem of a validation error as one line, with the nearest name for an unknown key."""
    problems = _own_problems(error)
    first = problems[0]
    path = _path(first["loc"], data)
    where = ".".join(str(part) for part in path) or "config"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], data)
        near = get_close_matches(str(path[-1]), known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}." if known else ""
        return f"{where}: no such setting.{hint}{more}"
    if first["type"] == "union_tag_invalid":
        found = first["ctx"]
        field = "architecture" if "architecture" in found["discriminator"] else "kind"
        return f"{where}.{field}: {_shortened(repr(found['tag']))} is none of {found['expected_tags']}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {_shortened(json.dumps(given))})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{shown}{more}" if path else f"{message}{more}"


def _own_problems(error: ValidationError) -> list[ErrorDetails]:
    """Without the problems that follow from others: a list whose only item is wrong counts as too short."""
    found = error.errors()
    inner = {each["loc"][:n] for each in found for n in range(len(each["loc"]))}
    return [each for each in found if each["type"] != "too_short" or each["loc"] not in inner]


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in RECIPES:
        return RECIPES[source]().model_dump(mode="json")
    if path.suffix not in (".toml", ".json"):
        near = get_close_matches(source, RECIPES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{source!r} is neither a recipe nor a .toml or .json file.{hint} Recipes: {', '.join(RECIPES)}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(f"{source}: no such file") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{source}: not UTF-8 (byte {err.start} is 0x{err.object[err.start]:02x})") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"{source}: cannot be read: {err}") from err
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else _parse_json(text)
    except ValueError as err:
        raise ConfigError(f"{source}: not valid {path.suffix[1:]}: {err}") from err
    except RecursionError as err:
        raise ConfigError(f"{source}: nested too deeply") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a config is a table of sections, not a {type(data).__name__}")
    return data


def _parse_json(text: str) -> Any:
    """JSON as its standard has it. Raises: ValueError, also for a key that is there twice and for NaN or Infinity."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_number)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _apply(data: dict[str, Any], setting: str) -> None:
    """Set one value in place. List items are addressed by their index."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {setting!r}: write path.to.field=value, as in --set saes.0.sae.k=32")
    try:
        value = _parse_json(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = path.split(".")
    target: Any = data
    for key in parents:
        if isinstance(target, list):
            target = target[_index(target, key, setting)]
        elif isinstance(target, dict):
            if target.get(key) is None:  # an optional section that the recipe leaves out
                target[key] = {}
            target = target[key]
        else:
            raise ConfigError(f"--set {setting!r}: {key!r} is inside a plain value")
    if isinstance(target, list):
        target[_index(target, last, setting)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"--set {setting!r}: {last!r} is inside a plain value")


def _index(items: list[Any], key: str, setting: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"--set {setting!r}: {key!r} is not one of the indices 0 to {len(items) - 1}")
    return int(key)


def _path(loc: tuple[int | str, ...], data: Any) -> list[int | str]:
    """The keys of an error's location, without the union tags that pydantic adds."""
    path: list[int | str] = []
    for position, key in enumerate(loc):
        items = dict(enumerate(data)) if isinstance(data, list) else data if isinstance(data, dict) else {}
        if key not in items and (position < len(loc) - 1 or key in (items.get("kind"), items.get("architecture"))):
            continue
        data = items.get(key)
        path.append(key)
    return path


def _known_keys(path: list[int | str], data: Any) -> list[str]:
    """Field names of every model that the config type allows at a path, of the kinds that `data` chooses."""
    schema = PipelineConfig.model_json_schema()
    options = _chosen(_options(schema, schema), data)
    for key in path:
        data = data[key]
        children = [child for option in options for child in _children([option], key)]
        options = _chosen([option for child in children for option in _options(child, schema)], data)
    return sorted({name for option in options for name in option.get("properties", {})})


def _chosen(options: list[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """The options whose fixed fields (`kind`, `architecture`) have the values that `data` gives them."""

    def fits(option: dict[str, Any]) -> bool:
        fields = option.get("properties", {}).items()
        return all(data[name] == field["const"] for name, field in fields if "const" in field and name in data)

    return [option for option in options if fits(option)] if isinstance(data, dict) else options


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    branches = node.get("anyOf", []) + node.get("oneOf", [])
    return [option for branch in branches for option in _options(branch, schema)] if branches else [node]


def _children(options: list[dict[str, Any]], key: int | str) -> list[dict[str, Any]]:
    found = []
    for option in options:
        if isinstance(key, int):
            found += [option["items"]] if "items" in option else []
        elif key in option.get("properties", {}):
            found.append(option["properties"][key])
        elif isinstance(option.get("additionalProperties"), dict):
            found.append(option["additionalProperties"])
    return found
