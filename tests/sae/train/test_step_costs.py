"""What a step costs a rank: worked by hand, and memory beside what tensors really take."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae.architectures.config import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.train import selection, step_costs
from sae.train.backward import DENSE_AUXK
from sae.train.config import MeshConfig, TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step_costs import DEAD_SHARE, memory, received_bytes, work

ROWS = 1024


def test_the_bytes_that_docs_mesh_states() -> None:
    # b = 1024 / 2 rows of 16 numbers, n = 64 / 4 latents, k = 4; 2 x 4 ranks.
    config = TrainConfig(sae=TopKConfig(d_sae=64, k=4), batch_rows=1024)
    found = received_bytes(config, 16, MeshConfig(data=2, latents=4))
    b, d, n, k, s, D, L = 512, 16, 64, 4, 4, 2, 4
    assert found["among_largest_of_row"] == (b * k * s + (s + 4) * b) * (L - 1) / L
    small = (d * s + s + 4) * 2 * (L - 1) / L  # b_dec through the encoder, L0, whether any is dead
    assert found["sum_latents"] == 2 * b * d * s * (L - 1) / L + small
    assert found["sum_rows"] == 2 * (2 * n * d / L + n / L + d) * s * (D - 1) / D + 4 * s  # and four losses
    assert found["any_rows"] == n / L
    assert set(found) == {"among_largest_of_row", "sum_latents", "sum_rows", "any_rows"}


def test_one_rank_is_told_nothing() -> None:
    assert received_bytes(TrainConfig(sae=TopKConfig(d_sae=64, k=4)), 16, MeshConfig(), dead=True) == {}


def test_memory_worked_by_hand() -> None:
    # A matrix of a rank has 1024 / 4 rows of 512 float32; 512 rows of 2 data ranks.
    config = TrainConfig(sae=TopKConfig(d_sae=1024, k=8, k_aux=0), batch_rows=1024, ema_decay=0.9)
    found = memory(config, 512, MeshConfig(data=2, latents=4))
    parameters = 4 * (2 * 256 * 512 + 256 + 512)
    assert found.weights == 2 * parameters + 8 * 256  # the running mean; the clock
    assert (found.gradients, found.moments) == (parameters, 2 * parameters)
    assert found.batches == 2 * 512 * 512 * 4
    candidates, pairs = 512 * 8 * (12 + 30), 512 * 8 * 60 // 4
    assert found.step == 4 * 512 * 512 * 4 + 256 * 512 * 4 + pairs + candidates


def test_work_worked_by_hand() -> None:
    config = TrainConfig(sae=TopKConfig(d_sae=1024, k=8), batch_rows=1024)
    alone, shared = (work(config, 128, mesh) for mesh in (MeshConfig(), MeshConfig(data=2, latents=4)))
    assert alone.flops == 2 * 1024 * 1024 * 128 == 8 * shared.flops
    matrix, rows, pre_acts, pairs = 4 * 1024 * 128, 4 * 1024 * 128, 4 * 1024 * 1024, 4 * 1024 * 8 * 128
    assert alone.product_bytes == matrix + pre_acts
    # Adam 7 times over two matrices, 8 times over one for unit rows, both gradients written; tiles gone over 3 times.
    assert alone.moved_bytes == (14 + 8 + 2) * matrix + 16 * rows + 4 * pairs + 3 * pre_acts
    in_bfloat16 = work(TrainConfig.model_validate(config.model_dump() | {"selection": "bfloat16"}), 128, MeshConfig())
    assert in_bfloat16.dtype == "bfloat16"
    assert in_bfloat16.product_bytes == alone.product_bytes / 2


@pytest.mark.parametrize(
    ("sae", "d_in", "changes"),
    [
        (TopKConfig(d_sae=2048, k=32, k_aux=0), 64, {}),
        (TopKConfig(d_sae=2048, k=32, k_aux=0), 512, {"ema_decay": 0.9}),
        (TopKConfig(d_sae=2048, k=32, k_aux=0), 512, {"selection": "bfloat16"}),
        (BatchTopKConfig(d_sae=2048, k=32, k_aux=0), 512, {}),
        (StandardConfig(d_sae=2048, l1_coefficient=1e-3), 64, {}),
        (TopKConfig(d_sae=1024, k=8, k_aux=12), 512, {}),
        (BatchTopKConfig(d_sae=2048, k=32, k_aux=128), 64, {}),
    ],
    ids=["topk", "running mean", "bfloat16", "batch_topk", "standard", "AuxK by pairs", "AuxK by matrices"],
)
def test_memory_is_what_tensors_take(
    sae: SAEConfig, d_in: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their peak in a step: hardly more, and not much less."""
    # Of a GPU that went about it as the CPU does here.
    monkeypatch.setattr(selection, "GPU_TILE_BYTES", 0)
    monkeypatch.setattr(step_costs, "DENSE_AUXK_ON_GPU", DENSE_AUXK)
    config = TrainConfig.model_validate({"sae": sae, "batch_rows": ROWS, "auxk_after_tokens": 10**6, **changes})
    x = torch.randn(ROWS, d_in, generator=torch.Generator().manual_seed(0))
    moments = DataMoments.of(x)  # looks at views of x, whose memory is not the run's
    with _Tensors() as tensors:
        run = TrainingRun(config, moments, 100, rows=RowsInMemory(x, ROWS, 0))
        run.advance(x)
        run.state.clock.tokens_since_fired[: int(DEAD_SHARE * sae.d_sae)] = 10**6
        kept = tensors.now
        run.advance(x)
    needed = memory(config, d_in, MeshConfig())
    assert needed.kept == pytest.approx(kept, rel=0.01)
    assert 0.8 * (needed.kept + needed.step) < tensors.peak < 1.05 * (needed.kept + needed.step)


class _Tensors(TorchDispatchMode):
    """Bytes of the tensors that were made under it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if storage.nbytes() and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
