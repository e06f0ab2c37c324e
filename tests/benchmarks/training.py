"""Our training step against a plain dense autograd loop on the same batches."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sae.architectures.config import SAEConfig, StandardConfig, TopKConfig
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from tests.benchmarks.timing import Row, compare

BATCH_ROWS, D_IN, D_SAE, K, N_STEPS = 2048, 512, 2048, 24, 4


class PlainSAE(torch.nn.Module):
    """What one writes first: two dense products, a scatter, autograd."""

    def __init__(self, k: int | None) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(D_IN, D_SAE)
        self.decoder = torch.nn.Linear(D_SAE, D_IN)
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre_acts = self.encoder(x - self.decoder.bias)
        if self.k is None:
            latents = pre_acts.relu()
        else:
            values, ids = pre_acts.topk(self.k, dim=1)
            latents = torch.zeros_like(pre_acts).scatter(1, ids, values.relu())
        return self.decoder(latents), latents


def training(folder: Path) -> Iterator[Row]:
    """Rows/s of a step, projection, Adam and renormalisation included."""
    x = torch.randn(BATCH_ROWS * N_STEPS, D_IN, generator=torch.Generator().manual_seed(0)).relu()
    batches = x.split(BATCH_ROWS)
    configs: dict[str, SAEConfig] = {
        f"topk step, k={K} / dense autograd loop": TopKConfig(d_sae=D_SAE, k=K),
        "standard step / dense autograd loop": StandardConfig(d_sae=D_SAE, l1_coefficient=1e-3),
    }
    for what, config in configs.items():
        run = TrainingRun(
            TrainConfig(sae=config), DataMoments.of(x), n_steps=10_000, rows=RowsInMemory(x, BATCH_ROWS, 0)
        )
        plain = PlainSAE(K if config.architecture == "topk" else None)
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)

        def ours(run: TrainingRun = run) -> None:
            for batch in batches:
                run.advance(batch)

        def reference(plain: PlainSAE = plain, optimizer: torch.optim.Adam = optimizer) -> None:
            for batch in batches:
                x_hat, latents = plain(batch)
                loss = (x_hat - batch).square().mean() + (1e-6 * latents.sum() if plain.k is None else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        yield compare(f"{what} (d_in {D_IN}, d_sae {D_SAE})", ours, reference, len(x), "rows")
