"""sparsify's Trainer.fit, with its Adam or its signum.

What stands for the model gives out the batches as the output of its module, and the data set is empty contexts, as many
as make a batch.
"""

import contextlib
import io
import sys
from types import SimpleNamespace

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn
from training import HOOK, Batches, Case, Reconstruct, Weights, report

CONTEXT_ROWS = 128


class GivenModel(nn.Module):
    """A model whose module `act` puts out the next batch."""

    device = torch.device("cpu")
    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.act = nn.Identity()
        self.d_in, self.batches = batches.case.d_in, iter(batches)

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """A context of one token, by which it asks for the width of the module."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def forward(self, input_ids: Tensor) -> None:
        dummy = input_ids.numel() == 1
        x = torch.zeros(1, self.d_in) if dummy else next(self.batches)
        self.act(x.view(*input_ids.shape, self.d_in))


class Contexts:
    """Token ids that nobody reads."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.n:
            raise IndexError(index)
        return {"input_ids": torch.ones(CONTEXT_ROWS, dtype=torch.long)}


def train(case: Case, batches: Batches) -> tuple[Weights, Reconstruct]:
    config = TrainConfig(
        SaeConfig(num_latents=case.d_sae, k=case.k),
        batch_size=case.batch_rows // CONTEXT_ROWS,
        optimizer=sys.argv[2],
        lr=case.lr,
        lr_warmup_steps=1000 if case.warmup_steps is None else case.warmup_steps,
        hookpoints=[HOOK],
        init_seeds=[case.seed],
        log_to_wandb=False,
        save_every=case.n_steps + 2,
        save_dir=str(case.folder / "sparsify"),
    )
    contexts = Contexts(case.n_tokens // CONTEXT_ROWS)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(config, contexts, GivenModel(batches))
        trainer.fit()
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):  # schedule-free: the weights to use are not those that are trained
            optimizer.eval()
    sae = trainer.saes[HOOK]
    sae.set_decoder_norm_to_unit_norm()
    weights = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return weights, lambda x: sae(x).sae_out


if __name__ == "__main__":
    report("eai-sparsify", train)
