"""What of the labels' configuration is refused, and what of it is in an artefact's name."""

from pathlib import Path
from typing import Any

import pytest

from flows.settings import load_config
from flows.stages import FOLLOWS
from sae.errors import ConfigError
from sae.plan import PipelineConfig, make_plan
from tests.flows.conftest import tiny_config, with_settings

ENDPOINT = {"kind": "openai", "base_url": "https://host/v1", "model": "m", "api_key_env": "SOME_API_KEY"}
SECRET = "sk-proj-0123456789"


def settings(*changes: str) -> list[str]:
    return [f"labels.explainer.{name}={value}" for name, value in ENDPOINT.items()] + list(changes)


def plan(config: PipelineConfig, labels: dict[str, Any]) -> Any:
    return make_plan(with_settings(config, {"labels": {"explainer": ENDPOINT} | labels}))


def test_labels_are_set_on_the_command_line() -> None:
    labels = load_config("default", settings("labels.latents=[3,5]"), None).labels
    assert labels is not None
    assert labels.latents == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels.latents=[3,3]", "latents.1: 3 is there twice"),
        ("labels.latents=[-1]", "latents.0: -1 is no latent's number"),
        ("labels.latents=[]", "name at least one"),
        ("labels.latents=[99999]", r"labels.latents.0: there is no latent 99999 in an SAE of d_sae = 2048"),
        ("labels.contexts.n_scored_per_quarter=9", "10 contexts of each quarter, but statistics.n_per_group = 5"),
        ("labels.explainer.kind=mind", "labels.explainer.kind: 'mind' is none of"),
        ("labels.n_latent=3", r"no such setting. Did you mean 'n_latents'\?"),
        ("labels.explainer.api_key=x", r"no such setting. Did you mean 'api_key_env'\?"),
        ("labels.explainer.base_url=host/v1", "base_url: not an address"),
    ],
)
def test_a_wrong_setting_is_named(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("default", settings(change), None)


def test_labels_of_given_activations_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels: given activations come without text"):
        load_config("toy", settings(), None)


@pytest.mark.parametrize("field", ["api_key_env", "base_url", "api_key"])
def test_a_key_that_is_given_as_a_setting_is_refused_and_not_repeated(field: str) -> None:
    value = f"https://user:{SECRET}@host/v1" if field == "base_url" else SECRET
    with pytest.raises(ConfigError) as caught:
        load_config("default", settings(f"labels.explainer.{field}={value}"), None)
    assert SECRET not in str(caught.value)


def test_where_a_model_is_asked_is_not_in_the_name_and_what_it_is_asked_is(tmp_path: Path, corpus: Path) -> None:
    config = tiny_config(tmp_path / "root", corpus)
    first = plan(config, {})

    def same(labels: dict[str, Any]) -> tuple[bool, bool]:
        other = plan(config, labels)
        return other.questions == first.questions, other.labels == first.labels

    elsewhere = {"base_url": "http://other/v1", "api_key_env": "OTHER_KEY", "n_at_once": 9, "timeout_seconds": 3}
    assert same({"explainer": ENDPOINT | elsewhere | {"n_retries": 0, "limit_field": "max_completion_tokens"}}) == (
        True,
        True,
    )
    assert same({"explainer": ENDPOINT | {"model": "other"}}) == (True, False)
    assert same({"explainer": ENDPOINT | {"temperature": 1.0}}) == (True, False)
    assert same({"max_tokens": 99}) == (True, False)
    assert same({"contexts_per_request": 5}) == (True, False)
    assert same({"n_latents": 7}) == (False, False)
    assert same({"contexts": {"n_silent": 7}}) == (False, False)
    # Where they are named, how many random ones there would be is nothing.
    named = [plan(config, {"latents": [1, 2], "n_latents": n}).labels for n in (5, 9)]
    assert named[0] == named[1] != first.labels


def test_labels_change_the_report_and_nothing_before_it(tmp_path: Path, corpus: Path) -> None:
    config = tiny_config(tmp_path / "root", corpus)
    without, with_labels = make_plan(config), plan(config, {})
    assert with_labels.statistics == without.statistics
    assert with_labels.evaluations == without.evaluations
    assert with_labels.report.inputs["labels[0]"] == with_labels.labels[0].ref
    assert "labels[0]" not in without.report.inputs


def test_no_refresh_of_another_stage_asks_a_model_again() -> None:
    assert [stage for stage, following in FOLLOWS.items() if "labels" in following] == ["labels"]
