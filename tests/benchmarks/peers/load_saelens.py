"""SAELens's cached activations: its ActivationsStore over a data set in the layout of its CacheActivationsRunner.

The data set has the runner's features (contexts as Array2D) and is written once, by `datasets`, as the runner does. No
model takes part: with cached activations and no text the store asks it nothing.

python load_saelens.py FOLDER [CONTEXTS]    how many its buffer holds; as many as the others' if not given
"""

import sys
import warnings
from collections.abc import Iterator

import torch
from datasets import Array2D, Dataset, Features
from rows import Rows, report
from sae_lens.training.activations_store import ActivationsStore

HOOK, PROMPTS = "hook", 32


def store(rows: Rows, buffer_contexts: int) -> Iterator[torch.Tensor]:
    path = rows.folder / "saelens"
    if not path.exists():
        contexts = rows.act.reshape(-1, rows.context_rows, rows.d_in)
        features = Features({HOOK: Array2D(shape=contexts.shape[1:], dtype="float16")})
        Dataset.from_generator(lambda: ({HOOK: context} for context in contexts), features=features).save_to_disk(path)
    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=rows.context_rows,
        d_in=rows.d_in,
        n_batches_in_buffer=buffer_contexts,
        total_training_tokens=10 * rows.n_rows,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=rows.batch_rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(path),
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # a new epoch
    given = Rows()
    contexts = int(sys.argv[2]) if len(sys.argv) > 2 else given.buffer_contexts
    report("sae-lens", given, lambda: store(given, contexts))
