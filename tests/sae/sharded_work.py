"""Evaluation and statistics of SAEs on ranks that share their latents. Called in every rank, and in one process."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sae import sharded
from sae.architectures import SAE
from sae.architectures.topk import TopKSAE
from sae.errors import InputError, StopRequested, TransientError
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.evaluate import evaluate_sae
from sae.progress import Progress, silent
from sae.sharded import nearest_decoders, with_sae
from sae.statistics import decoder
from sae.statistics.config import StatisticsSpec
from sae.statistics.statistics import count_parts, merge_statistics, statistics_of_part
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.train.mesh import Mesh, MeshConfig
from tests.sae.conformance.planted import Mutation, planted

CASES = "cases.json"
WITH_MISTAKES = "topk"
N_ROWS, D_IN, D_SAE, N_NEAREST = 8, 12, 16, 3


class Case(NamedTuple):
    """An SAE in roots of its own: one for every way to go through it."""

    statistics: StatisticsSpec
    evaluation: EvaluationSpec


def _no_check() -> None:
    """The comparison is made by the test."""


MISTAKES = {
    name: Mutation(function, old, new, _no_check)
    for name, function, old, new in (
        ("k of each share", TopKSAE.encode_own, "among_largest(values, k)", "(among_largest(values, k), None)[1]"),
        ("own numbers", sharded._Line._encode, "latent + self._own.start", "latent"),
        ("own reconstruction", sharded._Line._decode, "self._shared.sum_latents", ""),
        ("neighbours of the first's", sharded._Line._nearest, "self._own.start + start, self._own.stop", "start, 8"),
        ("b_dec of each", sharded._Line._decode, "self.share.sum_decoder_rows", "self.share.decode_sparse"),
    )
}

NEEDS_TABLES = ("neighbours of the first's",)


def do_all(storage: Storage, case: Case, shared: Collectives = ALONE, merge: bool = True) -> None:
    """Statistics of every part, merged, and the evaluation."""

    def work(sae: SAE, progress: Progress) -> None:
        for part in range(count_parts(storage, case.statistics)):
            statistics_of_part(storage, case.statistics, part, sae=sae, progress=progress)
        if merge:
            merge_statistics(storage, case.statistics, sae=sae, nearest=nearest_decoders, progress=progress)
        evaluate_sae(storage, case.evaluation, sae=sae, progress=progress)

    with_sae(storage, case.statistics.sae, work, shared=shared)


def write_cases(folder: Path, cases: dict[str, Case]) -> None:
    """For the ranks to read."""
    specs = {name: [spec.model_dump(mode="json") for spec in case] for name, case in cases.items()}
    (folder / CASES).write_text(json.dumps(specs))


def all_cases(folder: Path) -> dict[str, Tensor]:
    """Every case in its root, once with each mistake in a root of its own, and what ranks tell each other."""
    mesh = Mesh(MeshConfig(latents=dist.get_world_size()), timedelta(seconds=60))
    for name, (statistics, evaluation) in json.loads((folder / CASES).read_text()).items():
        case = Case(StatisticsSpec.model_validate(statistics), EvaluationSpec.model_validate(evaluation))
        storage = Storage(str(folder / name))
        with mock.patch.object(sharded, "BLOCK_ELEMENTS", 5 * D_SAE // mesh.world):  # five rows at a time
            do_all(storage, case, mesh)
        if mesh.world == 2 and name == WITH_MISTAKES:
            for mistake, mutation in MISTAKES.items():
                with planted(mutation):
                    do_all(Storage(str(folder / mistake)), case, mesh, merge=mistake in NEEDS_TABLES)
            end_early(storage, case.statistics.sae, mesh)
    return bytes_received(storage, case.statistics.sae)


def bytes_received(storage: Storage, ref: str) -> dict[str, Tensor]:
    """In finding the latents of some rows, in reconstructing them and in finding neighbours; how many latents there
    were, and the neighbours, also as one process finds them."""
    mesh, found = Mesh(MeshConfig(latents=dist.get_world_size()), timedelta(seconds=60)), {}
    x = torch.randn(N_ROWS, D_IN, generator=torch.Generator().manual_seed(0))

    def work(sae: SAE, progress: Progress) -> None:
        sparse = sae.encode_sparse(x)
        sae.decode_sparse(sparse, len(x))
        found["latents"] = torch.bincount(sparse.latent, minlength=sae.d_sae)
        with_blocks = nearest_decoders(sae, N_NEAREST), decoder.nearest_decoders(sae.W_dec, N_NEAREST)
        found["nearest"], found["cosines"] = map(torch.stack, zip(*with_blocks, strict=True))

    with mock.patch.object(decoder, "BLOCK_ELEMENTS", 3 * D_SAE):  # three latents at a time
        with_sae(storage, ref, work, shared=mesh)
    return found | {method: torch.tensor(n_bytes) for method, n_bytes in mesh.received.items()}


def end_early(storage: Storage, ref: str, mesh: Mesh) -> None:
    """One rank fails or is asked to stop: all know; and while the first is busy the others hear of it."""

    def fail(sae: SAE, progress: Progress) -> None:
        sae.encode_sparse(torch.zeros(1, D_IN + 1))

    def go_on(sae: SAE, progress: Progress) -> None:
        for done in range(5):
            progress(done, 5, "things")
            if sharded.ALIVE_SECONDS:
                sae.encode(torch.zeros(1, D_IN))

    def stop_at(n_calls: int) -> Progress:
        def progress(done: int, *_: Any) -> None:
            if done == n_calls:
                raise StopRequested("enough")

        return progress

    with pytest.raises(InputError if mesh.rank == 0 else TransientError):
        with_sae(storage, ref, fail, shared=mesh)
    for rank in range(mesh.world):
        with pytest.raises(StopRequested):
            with_sae(storage, ref, go_on, shared=mesh, progress=stop_at(2) if mesh.rank == rank else silent)
    heard: list[int] = []
    with mock.patch.object(sharded, "ALIVE_SECONDS", 0):
        with_sae(storage, ref, go_on, shared=mesh, progress=lambda done, *_: heard.append(done))
    assert heard == [*range(5)] + [5] * mesh.latent_rank
