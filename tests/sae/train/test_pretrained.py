"""Fine-tuning: training goes on from the weights of a finished SAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sae
from sae.architectures import SAE, StandardConfig, TopKConfig, build_sae
from sae.config import digest
from sae.errors import ConfigError, StoreError
from sae.progress import silent
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from sae.train.config import Pretrained, SAESpec, TrainConfig
from sae.train.in_memory import train_in_memory
from sae.train.loop import train_saes
from sae.train.pretrained import resolve_initial, start_from
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.weights import fold_input_scale, load_sae, save_sae

CONFIG = TrainConfig(sae=TopKConfig(d_sae=16, k=2), batch_rows=32, n_tokens=400, lr=0.01)


def _rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return ((rng.random((120, 12)) < 0.2) @ rng.standard_normal((12, 6)) * 5 + 3).astype(np.float32)


def _config(weights: str | Path, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | {"init": Pretrained(weights=str(weights))} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved SAE."""
    place = tmp_path / "exported"
    place.mkdir()
    save_sae(train_in_memory(torch.from_numpy(_rows()), CONFIG), place)
    return place


@pytest.mark.parametrize("scale", ["rms", "none"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG.sae,
        StandardConfig(d_sae=16, l1_coefficient=0.1),
        StandardConfig(d_sae=16, l1_coefficient=0.1, decoder="free"),
    ],
    ids=repr,
)
def test_before_the_first_step_it_computes_what_the_given_one_does(scale: str, config: Any, tmp_path: Path) -> None:
    x = torch.from_numpy(_rows())
    given = train_in_memory(x, TrainConfig.model_validate(CONFIG.model_dump() | {"sae": config}))
    save_sae(given, tmp_path)
    # Other data than it was trained on: another scale.
    rows = RowsInMemory(3 * x, 32, 0)
    config = _config(tmp_path, sae=config, input_scale=scale)
    run = TrainingRun(config, DataMoments.of(3 * x), 5, rows=rows, initial=given)
    assert run.state.sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-5 or not run.state.sae.unit_decoder
    torch.testing.assert_close(run.result()(x), given(x), rtol=1e-4, atol=1e-3)


def test_weights_may_go_from_a_form_that_subtracts_b_dec_to_one_that_does_not() -> None:
    x, sources = torch.from_numpy(_rows()), ("unit", "free")
    for source, target in (sources, sources[::-1]):
        given = train_in_memory(
            x,
            TrainConfig.model_validate(
                CONFIG.model_dump() | {"sae": StandardConfig(d_sae=16, l1_coefficient=0.1, decoder=source)}
            ),
        )
        new = build_sae(StandardConfig(d_sae=16, l1_coefficient=0.1, decoder=target), 6)
        start_from(new, given, 0.5, "it")
        fold_input_scale(new, 0.5)
        torch.testing.assert_close(new(x), given(x), rtol=1e-4, atol=1e-3)


def test_fine_tuning_begins_where_the_given_sae_ended(folder: Path) -> None:
    x = torch.from_numpy(_rows())
    told: list[str] = []
    sae.train(x, _config(folder, n_tokens=32, lr=1e-9), progress=lambda *a: told.append(a[3]))
    fresh: list[str] = []
    sae.train(
        x, TrainConfig.model_validate(CONFIG.model_dump() | {"n_tokens": 32}), progress=lambda *a: fresh.append(a[3])
    )
    assert told[0].split("fvu ")[1] < fresh[0].split("fvu ")[1]


def test_what_a_spec_is_named_after_is_the_content_of_the_files(folder: Path, tmp_path: Path) -> None:
    initial = resolve_initial(_config(folder))
    assert initial == resolve_initial(_config(f"{folder}/"))
    assert initial is not None
    assert resolve_initial(CONFIG) is None
    ref = f"saes/{digest('any')}"
    assert resolve_initial(_config(ref)) == ref
    spec = SAESpec(config=_config(ref), snapshot=f"activations/{digest('any')}", order_seed=0, initial=ref)
    assert spec.inputs["initial"] == ref
    cfg = folder / "cfg.json"
    cfg.write_text(cfg.read_text() + "\n")
    assert resolve_initial(_config(folder)) != initial


def test_an_sae_of_the_root_is_trained_on_and_interruptions_change_nothing(
    storage: Storage, tmp_path: Path, make_snapshot: Callable[..., Any]
) -> None:
    contents = []
    for root in (storage, Storage(str(tmp_path / "interrupted"))):
        snapshot = make_snapshot(root, [_rows()], row_group_rows=20)
        first = SAESpec(config=CONFIG, snapshot=snapshot.ref, order_seed=0)
        train_saes(root, [first], checkpoint_every_steps=0)
        config = _config(first.ref, seed=1, ema_decay=0.9)
        spec = SAESpec(config=config, snapshot=snapshot.ref, order_seed=0, initial=resolve_initial(config))
        if root is not storage:
            with pytest.raises(InterruptedError):
                train_saes(root, [spec], checkpoint_every_steps=2, progress=_interrupt)
        (record,) = train_saes(root, [spec], checkpoint_every_steps=2)
        contents.append(record.content)
    assert contents[0] == contents[1]


def _interrupt(done: int, *_: object) -> None:
    if done == 7:
        raise InterruptedError


def test_files_that_changed_since_the_plan_are_refused(
    storage: Storage, folder: Path, make_snapshot: Callable[..., Any]
) -> None:
    snapshot = make_snapshot(storage, [_rows()], row_group_rows=20)
    config = _config(folder)
    spec = SAESpec(config=config, snapshot=snapshot.ref, order_seed=0, initial=resolve_initial(config))
    train_saes(storage, [spec], checkpoint_every_steps=0)
    given = load_sae(folder)
    with torch.no_grad():
        given.b_enc.add_(1)
    save_sae(given, folder)
    with pytest.raises(StoreError, match="has changed since the run was planned"):
        train_saes(storage, [spec], checkpoint_every_steps=0)


def test_weights_of_other_sizes_are_refused_with_both_sizes(folder: Path) -> None:
    x = torch.from_numpy(_rows())
    message = r"init.weights: .*exported has d_sae = 16, d_in = 6; to be trained is an SAE of d_sae = {} on .*d_in = {}"
    with pytest.raises(ConfigError, match=message.format(8, 6)):
        sae.train(x, _config(folder, sae=TopKConfig(d_sae=8, k=2)), progress=silent)
    with pytest.raises(ConfigError, match=message.format(16, 4)):
        sae.train(x[:, :4], _config(folder), progress=silent)


def test_rows_of_different_norms_are_refused_where_latents_are_ranked(folder: Path) -> None:
    given: SAE = load_sae(folder)
    given.W_dec[3] *= 2
    with pytest.raises(ConfigError, match=r"norms from .* topk ranks latents"):
        start_from(build_sae(CONFIG.sae, 6), given, 1.0, "it")


def test_weights_that_are_not_there_are_one_clear_error(
    storage: Storage, make_snapshot: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no SAE there"):
        resolve_initial(_config(tmp_path / "nothing"))
    snapshot = make_snapshot(storage, [_rows()], row_group_rows=20)
    ref = f"saes/{digest('none')}"
    spec = SAESpec(config=_config(ref), snapshot=snapshot.ref, order_seed=0, initial=ref)
    with pytest.raises(StoreError, match=f"{ref}.*never finished"):
        train_saes(storage, [spec], checkpoint_every_steps=0)
    assert read_record(storage, spec.ref) is None
