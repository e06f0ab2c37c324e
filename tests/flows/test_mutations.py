"""A valid config, changed at random, is a valid config or one line that says what is wrong with it."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.settings import load_config
from sae.errors import ConfigError, InputError, PipelineError
from sae.plan import PipelineConfig, make_plan
from sae.preflight import check_plan
from tests.flows.conftest import tiny_config

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.0, 0.5, 1.0, -0.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "1", "nan", "x" * 10_000, "\0", "a\nb", "漢字 🙂", "\ud800", "../..", "{seed}", "/nowhere", "nope://x"),
    *([], {}, [[]], [None], {"kind": "inline"}, {"": ""}),
]
KEYS = ("", "x", "kind", "architecture", "seed", "n_tokens", "漢", "sae", "url")


def given_config() -> dict[str, Any]:
    """The smallest config of given activations that has a value for most settings."""
    config = PipelineConfig.model_validate(
        {
            "activations": {
                "kind": "given",
                "sets": {
                    "a": {"kind": "inline", "values": [[0, 1], [1, 0], [1, 1], [2, 1]], "labels": ["p", "q", "r", "s"]},
                    "b": {"kind": "superposition", "n_features": 4, "d_in": 2, "n_samples": 50},
                },
                "part_bytes": 400,
                "row_group_bytes": 100,
            },
            "saes": [
                {"sae": {"architecture": "topk", "d_sae": 4, "k": 1}, "batch_rows": 2, "hook_point": "a"},
                {
                    "sae": {"architecture": "standard", "d_sae": 4, "l1_coefficient": 0.1},
                    "batch_rows": 10,
                    "hook_point": "b",
                },
            ],
            "evaluation": {"concepts": [{"name": "c", "rows": [0, 1]}], "replicates": {"n_seeds": 2}},
        }
    )
    return config.model_dump(mode="json", exclude={"execution": {"root"}})


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists, containers included, the whole excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def parent_of(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


@st.composite
def mutations(draw: st.DrawFn, base: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(data))
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent, last = parent_of(data, path), path[-1]
        what = draw(st.sampled_from(["delete", "replace", "replace", "insert", "swap", "repeat", "scale"]))
        if what == "delete":
            del parent[last]
        elif what == "replace":
            parent[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "insert" and isinstance(parent[last], dict):
            parent[last][draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "swap":
            other = draw(st.sampled_from(places))
            inside = other[: len(path)] == path or path[: len(other)] == other
            if not inside:
                there = parent_of(data, other)
                parent[last], there[other[-1]] = there[other[-1]], parent[last]
        elif what == "repeat" and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif what == "scale" and isinstance(parent[last], int | float):
            parent[last] = parent[last] * draw(st.sampled_from([-1, 2, 0.5, 10**3, 10**9]))
    return data


def outcome(data: dict[str, Any], folder: Path) -> PipelineConfig | str:
    """The config, once everything that can be known beforehand has been looked at; or the error's line."""
    path = folder / "config.json"
    path.write_text(json.dumps(data))
    try:
        config = load_config(str(path), [], str(folder / "root"))
        check_plan(make_plan(config))
    except (ConfigError, InputError) as err:
        return str(err)
    return config


def base_config(name: str, corpus: Path) -> dict[str, Any]:
    if name == "given":
        return given_config()
    return tiny_config(Path("unused"), corpus).model_dump(mode="json", exclude={"execution": {"root"}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.mark.parametrize("name", ["text", "given"])
def test_a_config_changed_at_random_is_planned_or_refused_in_one_line(name: str, corpus: Path, folder: Path) -> None:
    base = base_config(name, corpus)
    assert isinstance(outcome(base, folder), PipelineConfig)

    @settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutations(base))
    def check(data: dict[str, Any]) -> None:
        found = outcome(data, folder)
        if isinstance(found, str):
            assert found.strip()
            assert "\n" not in found
            assert len(found) < 1500, found[:300]

    check()
    assert not (folder / "root").exists()


def is_quick(config: PipelineConfig) -> bool:
    """Whether a run of it ends soon: no setting asks for millions of anything."""
    # A bound on a file's size costs no time, however large.
    asked = config.model_dump(exclude={"execution": True, "report": {"index_bytes": True}})
    numbers = [value for value in leaves(asked) if type(value) in (int, float)]
    return max(map(abs, numbers)) <= 1_100_000 and config.evaluation.n_bootstrap <= 1000


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
@pytest.mark.parametrize("name", ["text", "given"])
def test_what_was_planned_runs_or_fails_in_one_line(name: str, corpus: Path, tmp_path: Path) -> None:
    from flows.pipeline import pipeline

    base = base_config(name, corpus)
    survivors: dict[str, PipelineConfig] = {}

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutations(base))
    def collect(data: dict[str, Any]) -> None:
        config = outcome(data, tmp_path)
        if isinstance(config, PipelineConfig) and is_quick(config):
            survivors.setdefault(config.model_dump_json(exclude={"execution"}), config)

    collect()
    chosen = list(survivors.values())[:: max(1, len(survivors) // 12)][:12]
    assert len(chosen) > 5
    for number, config in enumerate(chosen):
        data = config.model_dump(mode="json")
        data["execution"] = {"root": str(tmp_path / f"root-{number}"), "retry_delay_seconds": 0}
        error = ""
        try:
            pipeline(PipelineConfig.model_validate(data))
        except PipelineError as err:
            error = str(err)
        assert "\n" not in error, data
