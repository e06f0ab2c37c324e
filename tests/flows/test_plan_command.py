"""`sae-pipeline plan`: its figures are those of the run, it leaves nothing behind, and it refuses what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from sae import estimate_needs
from sae.plan import PipelineConfig, make_plan
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config, with_settings
from tests.flows.models import HOOK_POINTS, save_model

Planned = Callable[..., tuple[int, dict[str, Any], str]]
GIVEN: dict[str, Any] = {
    "subject": None,
    "corpus": None,
    "activations": {
        "kind": "given",
        "sets": {"mine": {"kind": "inline", "values": [[float(i), 1.0, float(i * i)] for i in range(100)]}},
        "part_bytes": 360,
        "row_group_bytes": 120,
    },
    "saes": [{"sae": {"architecture": "topk", "d_sae": 8, "k": 2, "k_aux": 0}, "batch_rows": 16, "n_tokens": 250}],
    "evaluation": {"untrained": None},
}


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Planned:
    """Run `sae-pipeline plan CONFIG --json`. Returns: exit code, figures, stderr."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody listens there, and nobody has to

    def run(config: PipelineConfig, *options: str) -> tuple[int, dict[str, Any], str]:
        file = tmp_path / "config.json"
        file.write_text(config.model_dump_json())
        capsys.readouterr()
        code = main(["plan", str(file), "--json", *options])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> PipelineConfig:
    """The tiny pipeline on a root that does not exist."""
    return tiny_config(tmp_path / "new" / "root", corpus)


def test_figures_are_those_of_the_finished_run(finished: PipelineConfig, planned: Planned) -> None:
    code, found, err = planned(finished)
    assert (code, found["does_not_fit"]) == (0, []), err
    storage, plan = Storage(finished.execution.root), make_plan(finished)
    places = {(p["hook_point"], p["split"]): p for p in found["activations"] if not p["control"]}
    assert set(places) == set(plan.snapshots)
    for place, spec in plan.snapshots.items():
        snapshot, figures = read_snapshot(storage, spec.ref), places[place]
        assert figures["counted"]
        assert figures["n_parts"] == figures["n_parts_done"] == len(snapshot.parts)
        assert figures["n_row_groups"] == sum(len(part.layout.row_groups) for part in snapshot.parts)
        assert figures["d_in"] == snapshot.d_in
        # Special tokens, one a document, are counted and not stored.
        assert 0.9 * figures["n_rows"] <= snapshot.n_rows <= figures["n_rows"]
    (sae,) = found["saes"]
    assert sae["done"]
    assert sum(found["seconds"].values()) == 0


def test_a_plan_comes_before_everything_and_leaves_nothing(config: PipelineConfig, planned: Planned) -> None:
    code, found, err = planned(config)
    assert code == 0, err
    assert not Path(config.execution.root).parent.exists()
    (place,) = [p for p in found["activations"] if p["split"] == "train" and not p["control"]]
    assert not place["counted"]
    assert place["n_parts_done"] == 0
    assert (place["d_in"], place["dtype"]) == (32, "float16")
    assert 4000 <= place["n_rows"] < 4000 + place["part_rows"]
    assert place["n_bytes"] == place["n_rows"] * (2 * 32 + 12)
    assert found["probes"]["forward"]["widths"] == {place["hook_point"]: 32}
    assert set(found["seconds"]) == {"subject", "extraction", "training"}
    assert all(value > 0 for value in found["seconds"].values())
    assert found["cost"] == {"storage_per_month": 0, "requests": 0, "machine": pytest.approx(hours(found) * 2)}


def test_a_model_from_a_folder_and_how_well_its_rows_mix(
    config: PipelineConfig, planned: Planned, tmp_path: Path
) -> None:
    save_model("gpt2", tmp_path / "model")
    hooks = list(HOOK_POINTS["gpt2"][:2])
    changes = {
        "subject": {"kind": "huggingface", "name": str(tmp_path / "model")},
        "activations": config.activations.model_dump(mode="json") | {"hook_points": hooks},
        "saes": [s.model_dump(mode="json") | {"hook_point": hooks[0]} for s in config.saes],
        "evaluation": {"untrained": None},
    }
    code, found, err = planned(with_settings(config, changes))
    assert code == 0, err
    assert found["probes"]["forward"]["widths"] == dict.fromkeys(hooks, 16)
    assert all(-1 < rho < 1 for rho in found["probes"]["forward"]["rho"].values())
    # A small store is mixed whole: a draw without replacement.
    assert 0.8 < found["batch_variance"]["0"] <= 1.01
    assert "subject" not in found["seconds"], "it is there already"


def test_given_activations(config: PipelineConfig, planned: Planned) -> None:
    code, found, err = planned(with_settings(config, GIVEN))
    assert code == 0, err
    (place,) = found["activations"]
    # 12 bytes a row: 30 rows a part, 10 a row group; 100 rows.
    assert (place["n_rows"], place["n_parts"], place["n_row_groups"], place["counted"]) == (100, 4, 10, True)
    (sae,) = found["saes"]
    # Two epochs of 7 batches, and 50 rows of a third.
    assert (sae["n_rows"], sae["n_steps"], sae["epochs"]) == (250, 2 * 7 + 4, 2.5)
    assert "forward" not in found["probes"]


def test_a_bucket_costs_what_the_prices_say(config: PipelineConfig, planned: Planned, s3_root: str) -> None:
    prices = ("--price", "storage=1000000", "--price", "put=1000", "--price", "get=1", "--price", "hour=0")
    code, found, err = planned(with_settings(config, GIVEN), "--root", s3_root, *prices)
    assert code == 0, err
    assert list(Storage(s3_root).walk("")) == []
    (place,) = found["activations"]
    requests = found["requests"]
    # A part: listed twice, uploaded and recorded; asked for three times.
    # 10 row groups, read in 2.5 epochs, and twice, with their identities, by the statistics.
    assert requests == {"puts": 4 * 4, "gets": 4 * 3 + 25 + 20}
    cost = found["cost"]
    assert cost["storage_per_month"] == pytest.approx(place["n_bytes"] / 1e9 * 1e6)
    assert cost["requests"] == pytest.approx(requests["puts"] + requests["gets"] / 1000)
    assert cost["machine"] == 0


def test_a_remix_is_a_second_copy(config: PipelineConfig, planned: Planned) -> None:
    plain = planned(with_settings(config, GIVEN))[1]
    activations = GIVEN["activations"] | {"remix": {"part_bytes": 600}}
    code, found, err = planned(with_settings(config, GIVEN | {"activations": activations}))
    assert code == 0, err
    (place,), (remix,) = found["activations"], found["remixes"]
    assert (remix["n_parts"], remix["n_bytes"]) == (2, place["n_bytes"])
    assert found["stored_bytes"] == 2 * plain["stored_bytes"]
    # Four parts are dealt and two gathered, from two pieces of each.
    assert found["requests"]["puts"] - plain["requests"]["puts"] == (4 + 2) * 4
    assert found["requests"]["gets"] - plain["requests"]["gets"] == 2 * (10 + 4 * 2) + 3 * (4 + 2)
    assert found["seconds"]["remix"] > 0


def test_a_full_disk_is_refused_with_the_setting(
    config: PipelineConfig, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 1000)
    code, found, err = planned(config)
    assert code == 1
    assert "lower activations.n_tokens" in err
    assert (found["probes"], found["seconds"]) == ({}, {}), "what does not fit is not probed"


@pytest.mark.parametrize(
    ("machine_bytes", "setting"), [(100_000, "activations.part_bytes"), (120_000, "activations.row_group_bytes")]
)
def test_too_little_memory_is_refused_with_the_setting(
    machine_bytes: int,
    setting: str,
    config: PipelineConfig,
    planned: Planned,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activations = config.activations.model_dump(mode="json")
    if setting.endswith("part_bytes"):
        activations["part_bytes"] = 1 << 20
    else:
        activations |= {"part_bytes": 16 * 64, "n_tokens": None}
        config = with_settings(config, {"execution": config.execution.model_dump() | {"max_workers": 1}})
    monkeypatch.setattr(estimate_needs, "machine_bytes", lambda: machine_bytes)
    code, _, err = planned(with_settings(config, {"activations": activations}))
    assert code == 1
    assert f"does not fit: {setting}: " in err


def test_the_table_says_it_in_words(config: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert main(["plan", str(tmp_path / "config.json"), "--price", "hour=3"]) == 0
    out = capsys.readouterr().out
    for text in ("train       gpt_neox.layers.0.mlp.act: about 4,", "x 32 float16", "tokens/s", "at $3 per hour"):
        assert text in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--price", "gpu=1"], "--price 'gpu=1': write NAME=DOLLARS with one of storage, put, get, hour"),
        (["--price", "hour=cheap"], "--price 'hour=cheap': 'cheap' is no number"),
        (["--price", "hour=-1"], "a price is 0 or more"),
        (["--set", "activations.n_tokns=1"], "Did you mean 'n_tokens'"),
        (["--set", "saes.0.batch_rows=5000000", "--set", "activations.n_tokens=null"], "saes.0.batch_rows"),
        (["--set", 'activations.hook_points=["gpt_neox.layers.7"]'], "has no module 'gpt_neox.layers.7'"),
        (["--root", "gs://bucket"], "has no exclusive create here"),
    ],
)
def test_bad_input_is_one_clear_line(
    options: list[str], message: str, config: PipelineConfig, planned: Planned
) -> None:
    code, found, err = planned(config, *options)
    assert (code, found) == (2, {})
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node 0: at least 1"),
        (["--gpus-per-node", "4"], "--gpus-per-node belongs to --gpus"),
        (["--gpus", "2", "--gpu-memory", "80"], "--gpu-memory '80': write a number and one of kB, MB, GB"),
        (["--gpus", "2", "--gpu-memory", "much"], "--gpu-memory 'much': write a number"),
        (["--gpus", "2", "--rate", "disk=1"], "with one of float32, bfloat16, memory, nvlink, nic"),
        (["--gpus", "2", "--rate", "nic=fast"], "'fast' is no number"),
        (["--gpus", "2", "--rate", "nic=0"], "a rate is more than 0"),
        (["--gpus", "12"], "12 GPUs are no whole nodes of 8"),
        (["--gpus", "48"], "saes.0.sae.d_sae: 64 is no multiple of execution.mesh.latents = 48"),
    ],
)
def test_gpus_that_make_no_mesh_are_one_clear_line(
    options: list[str], message: str, config: PipelineConfig, planned: Planned
) -> None:
    code, found, err = planned(config, *options)
    assert (code, found) == (2, {})
    assert message in err.splitlines()[-1]


def test_a_mesh_of_gpus_with_its_reasons(
    config: PipelineConfig, planned: Planned, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--gpus", "8", "--gpus-per-node", "4", "--gpu-memory", "1GB", "--rate", "nic=1e9"]
    code, found, err = planned(config, *options)
    assert code == 0, err
    assert found["cluster"] == {"n_gpus": 8, "gpus_per_node": 4, "gpu_bytes": 10**9}
    assert found["rates"]["nic"] == 1e9
    assert [each["mesh"]["data"] * each["mesh"]["latents"] for each in found["layouts"]] == [8] * 4
    assert found["chosen"] == {key: value for key, value in found["layouts"][0].items() if key != "fits"}
    assert "saes.0 takes" in found["reasons"][0]
    assert not Path(config.execution.root).parent.exists(), "nothing is written, nothing is probed"
    assert main(["plan", str(tmp_path / "config.json"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    mesh = found["chosen"]["mesh"]
    assert lines[-1] == f"execution.mesh = {{ data = {mesh['data']}, latents = {mesh['latents']} }}"
    assert sum(" *  " in line for line in lines) == 1
    assert set(found["reasons"]) < set(lines)


def test_runs_of_a_sweep_are_named(config: PipelineConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saes = [config.saes[0].model_dump(mode="json") | {"seed": seed} for seed in range(4)]
    (tmp_path / "config.json").write_text(with_settings(config, {"saes": saes}).model_dump_json())
    assert main(["plan", str(tmp_path / "config.json"), "--gpus", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "execution.mesh = { data = 1, latents = 1 }, in 2 runs with these saes: 0 2 | 1 3"


def test_what_fits_no_gpu_is_refused(config: PipelineConfig, planned: Planned) -> None:
    code, found, err = planned(config, "--gpus", "2", "--gpu-memory", "100kB")
    assert (code, found) == (1, {})
    assert "does not fit: saes.0 (d_sae = 64, d_in = 32) takes at least" in err


def hours(found: dict[str, Any]) -> float:
    return sum(found["seconds"].values()) / 3600
