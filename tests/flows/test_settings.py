"""Configuration errors are one clear line that says what is wrong, where, and what is allowed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.recipes import RECIPES
from flows.settings import load_config
from sae.errors import ConfigError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config_that_survives_json(name: str, tmp_path: Path) -> None:
    config = RECIPES[name]()
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_config(str(path), [], None) == config == load_config(name, [], None)


def test_settings_change_one_field_and_nothing_else() -> None:
    changed = load_config("default", ["saes.0.sae.k=32", "seed=7", "report.title=A = B"], "elsewhere")
    assert changed.saes[0].sae.k == 32
    assert changed.seed == 7
    assert changed.report.title == "A = B"
    assert changed.execution.root == "elsewhere"
    assert changed.activations == RECIPES["default"]().activations


def test_toml_and_json_files_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        """
        [activations]
        kind = "given"
        [activations.sets.mine]
        kind = "inline"
        values = [[0, 1], [1, 0], [1, 1]]
        [[saes]]
        batch_rows = 3
        [saes.sae]
        architecture = "topk"
        d_sae = 4
        k = 1
        """
    )
    config = load_config(str(tmp_path / "a.toml"), [], None)
    (tmp_path / "a.json").write_text(config.model_dump_json())
    assert load_config(str(tmp_path / "a.json"), [], None) == config


INLINE = {"kind": "given", "sets": {"a": {"kind": "inline", "values": [[0, 1], [1, 0]]}}}
TOPK = {"sae": {"architecture": "topk", "d_sae": 4, "k": 1}}

NODES = [{"address": f"10.0.0.{number}"} for number in range(1, 4)]

BAD_SETTINGS = {
    "a cluster that is not named": (
        ["default", "--set", "execution.runner=ray"],
        r"execution: .*ray\.address: `local`, or HOST:PORT",
    ),
    "a cluster that is to be found": (
        ["default", "--set", "execution.ray.address=auto"],
        r"execution\.ray\.address: `local`, or HOST:PORT .*got \"auto\"",
    ),
    "Ray's client protocol": (
        ["default", "--set", "execution.ray.address=ray://head:10001"],
        r"execution\.ray\.address: `local`, or HOST:PORT",
    ),
    "one GPU and a half": (
        ["default", "--set", "execution.ray.address=local", "--set", "execution.ray.requests.sae.num_gpus=1.5"],
        r"execution\.ray\.requests\.sae\.num_gpus: a share of one GPU \(0\.25\), or whole ones",
    ),
    "no such stage": (
        ["default", "--set", "execution.ray.address=local", "--set", "execution.ray.requests.saes.num_gpus=1"],
        r"execution\.ray\.requests\.saes: no such setting\. Did you mean 'sae'",
    ),
    "two GPUs for a process of a mesh": (
        [
            *("default", "--set", "execution.runner=ray", "--set", "execution.ray.address=local"),
            *("--set", "execution.mesh.latents=2", "--set", "execution.ray.requests.evaluation.num_gpus=2"),
        ],
        r"execution: ray\.requests\.evaluation\.num_gpus: 2, but 2 processes share a task of this stage",
    ),
    "machines beside the cluster's": (
        [
            *("default", "--set", "execution.runner=ray", "--set", "execution.ray.address=local"),
            *("--set", "execution.mesh.latents=3", "--set", f"execution.nodes={json.dumps(NODES)}"),
        ],
        r"execution: nodes: with runner = \"ray\" the machines are those of the cluster",
    ),
    "another kind of device": (
        ["default", "--set", "execution.device=gpu"],
        r"execution\.device: Input should be 'auto', 'cpu' or 'cuda' \(got \"gpu\"\)$",
    ),
    "a GPU that nothing on the cluster asks for": (
        [
            *("default", "--set", "execution.runner=ray", "--set", "execution.ray.address=local"),
            *("--set", "execution.device=cuda", "--set", "execution.ray.requests.sae.num_gpus=1"),
        ],
        r"execution\.device: .* those of subject ask for none\. Set execution\.ray\.requests\.subject\.num_gpus",
    ),
    "unknown recipe": (["defualt"], r"'defualt' is neither a recipe .* Did you mean 'default'\?"),
    "missing file": (["nothing.toml"], r"nothing\.toml: no such file"),
    "unknown section": (["default", "--set", "sede=1"], r"sede: no such setting\. Did you mean 'seed'\?"),
    "unknown field": (["default", "--set", "corpus.contxt_tokens=1"], r"corpus\.contxt_tokens: .*'context_tokens'"),
    "unknown field of a union": (
        ["default", "--set", "saes.0.sae.kk=1"],
        r"saes\.0\.sae\.kk: no such setting\. Did you mean 'k'\?",
    ),
    "k larger than d_sae": (["default", "--set", "saes.0.sae.k=4096"], r"saes\.0\.sae: k = 4096 is larger than d_sae"),
    "wrong type": (["default", "--set", "saes.0.batch_rows=many"], r"saes\.0\.batch_rows: .*integer.*got \"many\""),
    "no list in a grid": (
        ["default", "--set", "saes.0.grid.sae.k=[]"],
        r"default: saes\.0\.grid\.sae\.k: a list of values, at least one, not \[\]$",
    ),
    "wrong value in a grid": (
        ["default", "--set", "saes.0.grid.sae.k=[24, 4096]"],
        r"saes\.1\.sae: k = 4096 is larger than d_sae",
    ),
    "unknown key in a grid": (
        ["default", "--set", "saes.0.grid.sae.kk=[1, 2]"],
        r"saes\.0\.sae\.kk: no such setting\. Did you mean 'k'\?",
    ),
    "typo of a grid": (
        ["default", "--set", "saes.0.gird=1"],
        r"saes\.0\.gird: no such setting\. Did you mean 'grid'\?",
    ),
    "out of range": (["default", "--set", "saes.0.sae.k=0"], r"saes\.0\.sae\.k: .*greater than 0 \(got 0\)"),
    "unknown architecture": (
        ["default", "--set", "saes.0.sae.architecture=top_k"],
        r"saes\.0\.sae\.architecture: 'top_k' is none of 'batch_topk', 'standard', 'topk'",
    ),
    "index out of range": (["default", "--set", "saes.3.lr=1"], r"'3' is not one of the indices 0 to 0"),
    "setting without a value": (["default", "--set", "seed"], r"write path\.to\.field=value"),
    "setting inside a value": (["default", "--set", "seed.x=1"], r"'x' is inside a plain value"),
    "root without exclusive create": (["toy", "--root", "gs://bucket/x"], r"gs:// has no exclusive create"),
    "wrong set": (
        ["superposition", "--set", "saes.0.hook_point=20-in-6"],
        r"saes\.0\.hook_point: '20-in-6' is not extracted \(did you mean '20-in-5'\?",
    ),
    "batch larger than the data": (
        ["default", "--set", "saes.0.batch_rows=2000000"],
        r"saes\.0\.batch_rows: 2000000 is more than activations\.n_tokens = 1000000",
    ),
    "latents that a mesh cannot share": (
        ["default", "--set", "execution.mesh.latents=3"],
        r"saes\.0\.sae\.d_sae: 2048 is no multiple of execution\.mesh\.latents = 3$",
    ),
    "rows that a mesh cannot share": (
        ["default", "--set", "execution.mesh.data=3"],
        r"saes\.0\.batch_rows: 2048 is no multiple of execution\.mesh's data \* latents = 3$",
    ),
    "streams that a mesh cannot share": (
        ["default", "--set", "execution.mesh.data=16"],
        r"execution\.mesh\.data: 16 processes cannot share the 8 streams .* Choose a divisor of 8$",
    ),
    "machines that a mesh cannot be put on": (
        ["default", "--set", "execution.mesh.data=4", "--set", f"execution.nodes={json.dumps(NODES)}"],
        r"nodes: 3 machines cannot have equally many of the 4 processes of mesh = 4 x 1$",
    ),
    "machines for one process": (
        ["default", "--set", f"execution.nodes={json.dumps(NODES)}"],
        r"nodes: a mesh of 1 x 1 is one process on this machine\.",
    ),
    "a deadline before its cause": (
        ["default", "--set", "execution.heartbeat_timeout_seconds=100"],
        r"heartbeat_timeout_seconds: 100 must be more than collective_timeout_seconds = 300",
    ),
    "model without corpus": (["default", "--set", "corpus=null"], r"need `subject` and `corpus`"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_SETTINGS[case]
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert list(tmp_path.iterdir()) == []


BAD_FILES = {
    "not toml": ("a.toml", "seed = = 1", "not valid toml"),
    "not json": ("a.json", "{", "not valid json"),
    "a list": ("a.json", "[1]", "a config is a table"),
    "no saes": ("a.json", json.dumps({"activations": INLINE, "saes": []}), "saes: .*at least 1"),
    "ragged rows": (
        "a.json",
        json.dumps(
            {"activations": INLINE | {"sets": {"a": {"kind": "inline", "values": [[1], [1, 2]]}}}, "saes": [TOPK]}
        ),
        "rows have different lengths",
    ),
    "given with a corpus": (
        "a.json",
        json.dumps({"activations": INLINE, "saes": [TOPK], "corpus": {}}),
        "leave out `subject` and `corpus`",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    name, text, message = BAD_FILES[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(tmp_path / name), [], None)
    assert str(tmp_path / name) in str(caught.value)


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "gpt2-small", "--root", str(tmp_path / "root")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 75
    assert re.search(r"the Hugging Face hub cannot be|the hub cannot be asked", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_of_another_flow_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--only", "sae"]) == 2
    assert "the extract flow has the stages subject, tokens, activations" in capsys.readouterr().err


def test_recipes_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line) > 30 for line in lines)


def test_show_refuses_what_is_no_artefact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "some/where"]) == 2
    assert "not an artefact" in capsys.readouterr().err
