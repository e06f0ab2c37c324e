"""An SAE whose latents lie on several ranks has the statistics and the evaluation of one process, to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.evaluate.config import EvaluationConfig, EvaluationSpec
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.statistics import count_parts
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from tests.sae import sharded_work
from tests.sae.conftest import HOOK_POINT
from tests.sae.sharded_work import D_IN, D_SAE, MISTAKES, N_NEAREST, N_ROWS, WITH_MISTAKES, Case
from tests.sae.train.ranks import run_ranks

K = 3
FIGURES = "evaluation.json"
CONFIGS: dict[str, SAEConfig] = {
    "more than a share has": TopKConfig(d_sae=D_SAE, k=D_SAE // 2 + 1),
    "batch_topk": BatchTopKConfig(d_sae=D_SAE, k=K),
    "standard": StandardConfig(d_sae=D_SAE, l1_coefficient=0, decoder="free"),
    "topk": TopKConfig(d_sae=D_SAE, k=K),
}


def contents(root: Path, case: Case) -> dict[str, Any]:
    """What statistics and evaluation hold: the digests of tables and of parts, and the figures."""
    storage, found = Storage(str(root)), {}
    refs = [(case.statistics.ref, part) for part in range(count_parts(storage, case.statistics))]
    for ref, part in [*refs, (case.statistics.ref, None), (case.evaluation.ref, None)]:
        if (record := read_record(storage, ref, part)) is None:
            continue  # merged parts, where they were not
        found |= {f"{ref} {part} {entry.name}": entry.xxh3 for entry in record.files if entry.name != FIGURES}
        if ref == case.evaluation.ref:
            found[FIGURES] = json.loads(storage.read_bytes(record.path(FIGURES)))
    return found


class Worked:
    """What ranks made in roots of a folder, and one process."""

    def __init__(self, world: int, folder: Path, cases: dict[str, Case]) -> None:
        self.folder, self.cases = folder, cases
        for name in cases:
            shutil.copytree(folder / name, folder / f"{name} alone")
        for name in MISTAKES:
            shutil.copytree(folder / WITH_MISTAKES, folder / name)
        sharded_work.write_cases(folder, cases)
        for name, case in cases.items():
            sharded_work.do_all(Storage(str(folder / f"{name} alone")), case)
        self.told: list[dict[str, Tensor]] = run_ranks(world, sharded_work.all_cases, folder)

    def assert_equal(self, name: str) -> None:
        case = self.cases[name]
        found, alone = (contents(self.folder / root, case) for root in (name, f"{name} alone"))
        # A model's own activations are numbers of all kinds, whose products round as their matrices are cut.
        spliced, expected = (figures[FIGURES].pop("ce") for figures in (found, alone))
        assert found == alone
        assert (spliced is None) == (case.evaluation.subject is None)
        if spliced is not None:
            for figure in ("sae", "kl"):
                assert spliced[figure] == pytest.approx(expected[figure], rel=1e-5)


@pytest.fixture
def make_worked(tmp_path: Path, make_world) -> Callable[..., Worked]:
    def make(world: int, pin_model: Callable[[Storage], str] | None = None) -> Worked:
        cases = {}
        for name, config in CONFIGS.items():
            root = str(tmp_path / name)
            subject = pin_model(Storage(root)) if pin_model else None
            sizes = {"n_train": 10, "n_heldout": 6, "contexts_per_part": 10, "d_in": D_IN}
            extracted_from = {"subject": subject} if subject else {}
            of = make_world(sae_config=config, root=root, exact=True, **sizes, **extracted_from)
            common = {"sae": of.sae_ref, "tokens": of.tokens, "subject": subject, "seed": 0, "hook_point": HOOK_POINT}
            cases[name] = Case(
                StatisticsSpec(
                    config=StatisticsConfig(n_top=3, n_samples=16, n_per_group=2, context_tokens=5),
                    snapshots=of.snapshots,
                    **common,
                ),
                EvaluationSpec(
                    config=EvaluationConfig(n_contexts=4, n_bootstrap=20, min_fires=5, untrained=None),
                    architecture=config,
                    train_snapshot=of.snapshots["train"],
                    heldout_snapshot=of.snapshots["heldout"],
                    **common,
                ),
            )
        return Worked(world, tmp_path, cases)

    return make


def test_two_ranks_find_what_one_process_does(make_worked) -> None:
    worked = make_worked(2)
    for name in CONFIGS:
        worked.assert_equal(name)
    case = worked.cases[WITH_MISTAKES]
    right = contents(worked.folder / WITH_MISTAKES, case)
    for name in MISTAKES:
        assert any(right[key] != value for key, value in contents(worked.folder / name, case).items()), name
    _check_neighbours(worked.told[0])
    _check_bytes(worked.told)


def _check_neighbours(of_first: dict[str, Tensor]) -> None:
    """In several blocks of each rank's latents, whose products round otherwise."""
    assert torch.equal(*of_first["nearest"])
    torch.testing.assert_close(*of_first["cosines"])


def _check_bytes(told: list[dict[str, Tensor]]) -> None:
    """As the module's docstring says; numbers of three things, and lengths, go before."""
    n_ranks, s = len(told), 4
    others, latents = (n_ranks - 1) / n_ranks, told[0]["latents"]
    for rank, received in enumerate(told):
        told_by_first = N_ROWS * D_IN * s + int(latents.sum()) * (16 + s)
        assert int(received.get("from_first", 0)) == told_by_first * (rank > 0)
        assert received["among_largest_of_row"] == (N_ROWS * K * s + N_ROWS * (s + 4)) * others
        of_others = int(latents[D_SAE // n_ranks :].sum()) * (rank == 0)
        n_blocks = -(-D_SAE // n_ranks // 3)
        of_latents = (D_SAE - D_SAE // n_ranks) * N_NEAREST * 12 * (rank == 0)
        lengths = (3 + 2 * n_blocks) * 2 * 8 * n_ranks * others
        assert received["to_first"] == of_others * (16 + s) + of_latents + lengths
        assert received["sum_latents"] == 2 * N_ROWS * D_IN * s * others + (3 + n_blocks) * 2 * 4 * 8 * others


@pytest.mark.slow
def test_four_ranks_find_what_one_process_does(make_worked, pin_one_layer_model) -> None:
    """Also where the reconstruction takes the place of a model's activations."""
    worked = make_worked(4, pin_one_layer_model)
    for name in CONFIGS:
        worked.assert_equal(name)
    _check_neighbours(worked.told[0])
    _check_bytes(worked.told)
