"""SAELens's own metrics: sae_lens.evals."""

from typing import Any

import torch
from given import Batches, Given, report
from sae_lens import SAE
from sae_lens.evals import (
    get_downstream_reconstruction_metrics,
    get_featurewise_weight_based_metrics,
    get_recons_loss,
    get_sparsity_and_variance_metrics,
)
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler


@torch.no_grad()
def measure(given: Given) -> dict[str, Any]:
    sae = SAE.load_from_disk(str(given.folder / "saelens"))
    model = load_model("AutoModelForCausalLM", str(given.folder / "model"), device="cpu")
    weights = get_featurewise_weight_based_metrics(sae)
    rows, downstream = {}, {}
    for batching, sizes in given.contexts_per_batch.items():
        figures, per_latent = get_sparsity_and_variance_metrics(
            sae,
            model,
            Batches(given.tokens, sizes),
            ActivationScaler(),
            n_batches=len(sizes),
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            eval_batch_size_prompts=0,
            model_kwargs={},
            ignore_tokens=[given.special],
        )
        rows[batching] = figures | weights | {"feature_density": per_latent["feature_density"]}
        for ignored, ignore_tokens in (("nothing ignored", None), ("special ignored", [given.special])):
            downstream.setdefault(ignored, {})[batching] = get_downstream_reconstruction_metrics(
                sae,
                model,
                Batches(given.tokens, sizes),
                ActivationScaler(),
                compute_kl=True,
                compute_ce_loss=True,
                n_batches=len(sizes),
                eval_batch_size_prompts=0,
                ignore_tokens=ignore_tokens,
            )
    model.model.get_output_embeddings().weight.mul_(given.peaky)
    peaky = get_recons_loss(sae, model, ActivationScaler(), given.tokens, compute_kl=True, compute_ce_loss=False)
    return {"rows": rows, "downstream": downstream, "peaky_kl": peaky["kl_div_with_sae"].mean().item()}


if __name__ == "__main__":
    report("sae-lens", measure)
