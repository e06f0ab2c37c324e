"""SAELens's SAETrainer.fit."""

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import manual_seed
from training import Batches, Case, Reconstruct, Weights, report

ARCHITECTURES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batch_topk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
}


def train(case: Case, batches: Batches) -> tuple[Weights, Reconstruct]:
    manual_seed(case.seed)
    sae_class, config_class = ARCHITECTURES[case.architecture]
    options = {} if case.architecture == "standard" else {"k": case.k}
    sae = sae_class(config_class(d_in=case.d_in, d_sae=case.d_sae, **options))
    settings = {"lr": case.lr, "lr_warm_up_steps": case.warmup_steps, "lr_decay_steps": case.decay_steps}
    config = SAETrainerConfig(
        total_training_samples=case.n_tokens,
        train_batch_size_samples=case.batch_rows,
        autocast=case.bf16,
        lr_end=0.0 if case.lr is None else case.lr / 10,  # filled in by its runner; a constant schedule ignores it
        **{name: value for name, value in settings.items() if value is not None},
    )
    SAETrainer(config, sae, iter(batches)).fit()
    norm = sae.W_dec.norm(dim=1)
    W_enc, b_enc = sae.W_enc.T * norm[:, None], sae.b_enc * norm
    if not sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc + W_enc @ sae.b_dec
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": sae.W_dec / norm[:, None], "b_dec": sae.b_dec}
    return weights, sae


if __name__ == "__main__":
    report("sae-lens", train)
