"""What a notebook user meets: `import sae`, load, encode, decode, train; and what is said when the input is wrong."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from sae.architectures import build_sae
from sae.errors import ConfigError, InputError, StoreError
from sae.extract.config import GivenActivations, InlineSource
from sae.extract.given import import_activations
from sae.plan import make_plan
from sae.progress import silent
from sae.store.artefacts.records import read_record
from sae.store.snapshots.snapshot import commit_snapshot
from sae.store.storage.filesystem import Storage
from sae.weights import save_sae

ROOT = Path(__file__).parents[2]
CONFIG = sae.TrainConfig(sae=sae.TopKConfig(d_sae=16, k=2), batch_rows=32, n_tokens=400, lr=0.01)


def _rows(n: int = 120) -> np.ndarray:
    rng = np.random.default_rng(0)
    return ((rng.random((n, 12)) < 0.2) @ rng.standard_normal((12, 6)) * 5 + 3).astype(np.float32)


@pytest.fixture
def stored(storage: Storage, make_snapshot: Callable[..., Any]) -> str:
    """The address of activations in a root."""
    return storage.uri(make_snapshot(storage, [_rows()], row_group_rows=20).ref)


def _equal(a: sae.SAE, b: sae.SAE) -> bool:
    return a.config == b.config and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_import_sae_loads_nothing_heavy() -> None:
    code = "import sae, sys; assert not {'torch', 'numpy', 'pydantic', 'tqdm'} & set(sys.modules); print(sae.load)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<function load")


def test_every_public_name_is_there_and_no_other() -> None:
    assert {name for name in sae.__all__ if getattr(sae, name, None) is None} == set()
    assert set(sae.__all__) <= set(dir(sae))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        sae.lode  # noqa: B018


def test_rows_in_memory_are_trained_on_encoded_and_decoded() -> None:
    x = torch.from_numpy(_rows())
    told: list[tuple[int, int, str]] = []
    model = sae.train(x, CONFIG, progress=lambda done, total, unit, note="": told.append((done, total, note)))
    latents = model.encode(x)
    assert latents.shape == (120, 16)
    assert int((latents > 0).sum(dim=1).max()) <= 2
    assert torch.equal(model.decode(latents), model(x))
    assert [done for done, *_ in told] == list(range(1, told[-1][1] + 1))
    assert "tokens/s; fvu 0." in told[-1][2]
    assert _equal(model, sae.train(_rows(), CONFIG, progress=silent))


def test_arrays_may_be_read_only_and_views() -> None:
    frozen, wide = _rows(), np.repeat(_rows(), 2, axis=1)
    frozen.flags.writeable = False
    expected = sae.train(_rows(), CONFIG, progress=silent)
    for array in (frozen, wide[:, ::2], frozen[::-1][::-1]):
        assert _equal(sae.train(array, CONFIG, progress=silent), expected)


def test_without_a_progress_callback_there_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sae.train(_rows(), CONFIG)
    assert "training: " in capsys.readouterr().err


def test_stored_activations_are_trained_on_once(stored: str) -> None:
    told: list[int] = []
    model = sae.train(stored, CONFIG, progress=lambda done, *_: told.append(done))
    assert told
    told.clear()
    again = sae.train(Path(stored), CONFIG, progress=lambda done, *_: told.append(done))
    assert told == []
    assert _equal(model, again)


def test_a_pipelines_config_trains_its_sae_on_what_was_extracted(tmp_path: Path) -> None:
    config = sae.PipelineConfig.model_validate(
        {
            "activations": GivenActivations(sets={"toy": InlineSource(values=tuple(map(tuple, _rows().tolist())))}),
            "saes": [CONFIG],
            "evaluation": {"untrained": None},
            "execution": {"root": str(tmp_path)},
        }
    )
    with pytest.raises(StoreError, match="never finished"):
        sae.train(config, progress=silent)
    plan, storage = make_plan(config), Storage(str(tmp_path))
    for place, part_sets in plan.parts.items():
        for spec in part_sets:
            import_activations(storage, spec)
        commit_snapshot(storage, plan.snapshots[place])
    model = sae.train(config, progress=silent)
    assert read_record(storage, plan.saes[0].ref) is not None
    assert _equal(model, sae.load(tmp_path))
    sweep = sae.PipelineConfig.model_validate(
        config.model_dump() | {"saes": [CONFIG, {**CONFIG.model_dump(), "seed": 1}]}
    )
    with pytest.raises(ConfigError, match="sweep of 2"):
        sae.train(sweep, progress=silent)


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_an_sae_is_loaded_from_whatever_names_it(
    kind: str, request: pytest.FixtureRequest, make_snapshot: Callable[..., Any], tmp_path: Path
) -> None:
    storage = Storage(request.getfixturevalue("s3_root") if kind == "s3" else str(tmp_path / "root"))
    address = storage.uri(make_snapshot(storage, [_rows()], row_group_rows=20).ref)
    model = sae.train(address, CONFIG, progress=silent)
    (name,) = storage.list("saes")
    record = read_record(storage, f"saes/{name}")
    assert record is not None
    for uri in (f"saes/{name}", f"saes/{name}/", f"saes/{name}/record.json", record.folder, ""):
        assert _equal(model, sae.load(storage.uri(uri))), uri
    for file in ("cfg.json", "sae.safetensors"):
        data = storage.read_bytes(record.path(file))
        storage.replace(f"exported/{file}", data)
    assert _equal(model, sae.load(storage.uri("exported")))
    sae.train(address, sae.TrainConfig.model_validate(CONFIG.model_dump() | {"seed": 1}), progress=silent)
    with pytest.raises(ConfigError, match=r"holds 2 SAEs: saes/.* \(topk, d_sae 16, k 2\), .*Say which"):
        sae.load(storage.root)


def test_an_address_that_means_no_sae_is_one_clear_error(stored: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no SAE but one of the activations"):
        sae.load(stored)
    with pytest.raises(StoreError, match="never finished"):
        sae.load(tmp_path / "root/saes/0123456789abcdef")
    with pytest.raises(ConfigError, match="no SAE there"):
        sae.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/cfg.json").write_text("{}")
    with pytest.raises(StoreError, match="not an SAE"):
        sae.load(tmp_path / "half")
    with pytest.raises(ConfigError, match="gs://"):
        sae.load("gs://bucket/saes/0123456789abcdef")


def test_a_damaged_sae_is_not_loaded(stored: str) -> None:
    sae.train(stored, CONFIG, progress=silent)
    root = Path(stored).parents[1]
    (weights,) = root.glob("saes/*/*/sae.safetensors")
    shutil.copy(weights, root / "copy")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(StoreError, match="differs from the recorded hash"):
        sae.load(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_rows(), None), "config is missing, expected a TrainConfig, as in"),
        ((_rows(), sae.TopKConfig(d_sae=16, k=2)), "config is a TopKConfig, expected a TrainConfig"),
        (([[1.0, 2.0]], CONFIG), "x is a list, expected rows"),
        ((np.array([["a"]]), CONFIG), "an array of <U1, expected floats"),
        ((_rows().astype(np.int64), CONFIG), r"expected floats \[rows, d_in\].*int64"),
        ((_rows()[0], CONFIG), r"expected floats \[rows, d_in\].*\(6,\)"),
        (("runs/saes/0123456789abcdef", CONFIG), "no activations have this address"),
    ],
)
def test_arguments_that_do_not_fit_are_one_clear_error(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sae.train(*arguments, progress=silent)


@pytest.fixture(
    scope="module", params=[sae.TopKConfig(d_sae=16, k=2), sae.StandardConfig(d_sae=16, l1_coefficient=0.1)]
)
def model(request: pytest.FixtureRequest) -> sae.SAE:
    return build_sae(request.param, 6)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("encode", torch.zeros(2, 5), "width 5 given to an SAE of d_in = 6"),
        ("encode", torch.zeros(2, 6).half(), "float16 given to an SAE of float32"),
        ("encode", torch.zeros(2, 6, device="meta"), r"meta given to an SAE of cpu.*x.to\('cpu'\)"),
        ("encode", torch.zeros(2, 6).to_sparse(), "a sparse tensor given"),
        ("encode", torch.tensor(1.0), "a single number given"),
        ("encode", np.zeros((2, 6), np.float32), r"a ndarray given.*torch.as_tensor\(x\)"),
        ("encode", [[0.0] * 6], "a list given"),
        ("encode_sparse", torch.zeros(6), r"rows \[rows, d_in\], not of \[6\]"),
        ("encode_sparse", torch.zeros(2, 3, 6), r"not of \[2, 3, 6\]: x.reshape\(-1, 6\)"),
        ("encode_sparse", [[0.0] * 6], "a list given"),
        ("decode", torch.zeros(2, 5), "5 latents given to an SAE of d_sae = 16"),
        ("decode", torch.zeros(2, 16).double(), "float64 given to an SAE of float32"),
    ],
)
def test_inputs_of_another_kind_are_one_clear_error(model: sae.SAE, method: str, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(model, method)(given)


def test_single_rows_and_empty_batches_are_inputs_like_others(model: sae.SAE) -> None:
    assert model.encode(torch.zeros(6)).shape == (16,)
    assert model.encode(torch.zeros(0, 6)).shape == (0, 16)
    assert model(torch.zeros(0, 6)).shape == (0, 6)
    assert model.encode_sparse(torch.zeros(0, 6)).value.shape == (0,)
    assert model.decode_sparse(model.encode_sparse(torch.zeros(0, 6)), 0).shape == (0, 6)


def test_an_sae_in_memory_is_saved_where_it_can_be_loaded(model: sae.SAE, tmp_path: Path) -> None:
    save_sae(model, f"{tmp_path}/new/folder")
    assert _equal(sae.load(tmp_path / "new" / "folder"), model)


def test_an_sae_says_what_it_is() -> None:
    assert repr(build_sae(sae.TopKConfig(d_sae=16, k=2), 6)) == "TopKSAE(d_in=6, d_sae=16, k=2)"


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_what_is_no_address_and_no_device_is_one_clear_error(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the address of an SAE, a string or a path, not a NoneType"):
        sae.load(None)
    with pytest.raises(ConfigError, match=f"device='{device}'\\): torch cannot use it: "):
        sae.load(tmp_path, device=device)


def test_an_sae_of_a_snapshot_that_is_not_there_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="never finished"):
        sae.train(f"{tmp_path}/activations/0123456789abcdef", CONFIG, progress=silent)
