"""dictionary_learning's own metrics: dictionary_learning.evaluation."""

from typing import Any

import torch
from dictionary_learning.evaluation import evaluate, loss_recovered
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from given import Given, report
from nnsight import LanguageModel
from safetensors.torch import load_file


@torch.no_grad()
def measure(given: Given) -> dict[str, Any]:
    tensors = load_file(given.folder / "dictionary_learning" / "ae.safetensors")
    d_sae, d_in = tensors["encoder.weight"].shape
    dictionary = AutoEncoderTopK(d_in, d_sae, given.k)
    dictionary.load_state_dict(tensors)
    model = LanguageModel(str(given.folder / "model"), device_map="cpu")
    module = model
    for name in given.hook_point.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    rows, downstream = {}, {}
    for batching, sizes in given.rows_per_batch.items():
        rows[batching] = evaluate(dictionary, iter(given.x.split(sizes)), n_batches=len(sizes))
    for batching in ("37", "16, 16 and 5"):
        batches = given.tokens.split(given.contexts_per_batch[batching])
        losses = [[loss.item() for loss in loss_recovered(batch, model, module, dictionary)] for batch in batches]
        # The means that `evaluate` takes, which wants a buffer of text.
        recovered = [(spliced - zero) / (clean - zero) for clean, spliced, zero in losses]
        clean, spliced, zero = (sum(column) / len(losses) for column in zip(*losses, strict=True))
        downstream[batching] = {
            "loss_original": clean,
            "loss_reconstructed": spliced,
            "loss_zero": zero,
            "frac_recovered": sum(recovered) / len(recovered),
        }
    return {"rows": rows, "downstream": {"nothing ignored": downstream}, "pad": model.tokenizer.pad_token_id}


if __name__ == "__main__":
    report("dictionary-learning", measure)
