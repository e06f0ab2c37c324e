"""Library calls that join two stages, as functions that a worker process can be told to run."""

from collections.abc import Sequence

import torch

from sae.architectures import SAE
from sae.evaluate import evaluate
from sae.evaluate.config import EvaluationSpec
from sae.extract import corpus, part
from sae.extract.config import PartsSpec, Source
from sae.progress import Progress, silent
from sae.sharded import nearest_decoders, with_sae
from sae.statistics import statistics
from sae.statistics.config import StatisticsSpec
from sae.store.storage.filesystem import Storage
from sae.subject import embedded
from sae.subject.config import TokenizerSpec
from sae.train import in_memory
from sae.train.collectives import ALONE, Collectives


def train_tokenizer(storage: Storage, spec: TokenizerSpec, source: Source, *, progress: Progress = silent) -> None:
    """The embedded model's tokenizer, from the training documents of its segment."""
    documents = corpus.training_texts(storage, spec.segments[0], source)
    embedded.train_tokenizer(storage, spec, documents, progress=progress)


def evaluate_sae(
    storage: Storage,
    spec: EvaluationSpec,
    *,
    device: torch.device | str = "cpu",
    shared: Collectives = ALONE,
    progress: Progress = silent,
) -> None:
    """An SAE's evaluation, with the replicates it asks for trained on the spot."""

    def work(sae: SAE, progress: Progress) -> None:
        replicates = in_memory.train_replicates
        evaluate.evaluate_sae(storage, spec, sae=sae, train_replicates=replicates, device=device, progress=progress)

    with_sae(storage, spec.sae, work, device=device, shared=shared, progress=progress)


def statistics_of_parts(
    storage: Storage,
    spec: StatisticsSpec,
    parts: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    shared: Collectives = ALONE,
    progress: Progress = silent,
) -> None:
    """Some parts' statistics, one after the other, each committed when it is done."""

    def work(sae: SAE, progress: Progress) -> None:
        for number in parts:
            statistics.statistics_of_part(storage, spec, number, sae=sae, device=device, progress=progress)

    with_sae(storage, spec.sae, work, device=device, shared=shared, progress=progress)


def merge_statistics(
    storage: Storage,
    spec: StatisticsSpec,
    *,
    device: torch.device | str = "cpu",
    shared: Collectives = ALONE,
    progress: Progress = silent,
) -> None:
    """The tables of all parts' statistics."""

    def work(sae: SAE, progress: Progress) -> None:
        statistics.merge_statistics(storage, spec, sae=sae, nearest=nearest_decoders, device=device, progress=progress)

    with_sae(storage, spec.sae, work, device=device, shared=shared, progress=progress)


def plan_parts(storage: Storage, specs: list[PartsSpec]) -> None:
    """How many parts each hook point's activations make."""
    for spec in specs:
        part.plan_parts(storage, spec)
