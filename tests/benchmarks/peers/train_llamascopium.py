"""llamascopium's Trainer.fit."""

from collections.abc import Iterator

import torch
from llamascopium.initializer import Initializer, InitializerConfig
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from llamascopium.trainer import Trainer, TrainerConfig
from torch import Tensor
from training import HOOK, Batches, Case, Reconstruct, Weights, report

ACTIVATIONS = {"topk": "topk", "batch_topk": "batchtopk", "standard": "relu"}


class Stream:
    """The batches as its activation sources give them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for x in self.batches:
            n = len(x)
            yield {HOOK: x, "tokens": torch.zeros(n, dtype=torch.long), "mask": torch.ones(n, dtype=torch.bool)}


def train(case: Case, batches: Batches) -> tuple[Weights, Reconstruct]:
    torch.manual_seed(case.seed)
    sae = SparseAutoEncoder(
        SAEConfig(
            hook_point_in=HOOK,
            hook_point_out=HOOK,
            d_model=case.d_in,
            expansion_factor=case.d_sae / case.d_in,
            act_fn=ACTIVATIONS[case.architecture],
            top_k=case.k,
        )
    )
    sae.set_dataset_average_activation_norm({HOOK: float(batches.rows[:65_536].norm(dim=1).mean())})
    # Its default start, weights uniform in [-1, 1], is meant to be followed by its search for a norm.
    initializer = Initializer(InitializerConfig(grid_search_init_norm=case.ours is None))
    initializer.initialize_parameters(sae)
    initializer.initialization_search(sae, next(iter(Stream(batches))))
    settings = {"lr": case.lr, "lr_warm_up_steps": case.warmup_steps, "lr_cool_down_steps": case.decay_steps}
    config = TrainerConfig(
        amp_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        k_warmup_steps=0,  # its default asks for an initial_k, which has none
        total_training_tokens=case.n_tokens,
        n_checkpoints=0,
        exp_result_path=str(case.folder / "llamascopium"),
        **{name: value for name, value in settings.items() if value is not None},
    )
    Trainer(config).fit(sae, Stream(batches))
    sae.standardize_parameters_of_dataset_norm()
    norm = sae.decoder_norm()
    W_enc = sae.W_E.T * norm[:, None]
    weights = {
        "W_enc": W_enc,
        "b_enc": sae.b_E * norm + W_enc @ sae.b_D,
        "W_dec": sae.W_D / norm[:, None],
        "b_dec": sae.b_D,
    }
    return weights, lambda x: sae.decode(sae.encode(x))


if __name__ == "__main__":
    report("llamascopium", train)
