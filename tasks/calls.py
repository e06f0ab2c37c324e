"""Library calls that join two stages, as functions that a worker process can be told to run."""

from sae.evaluate import evaluate
from sae.evaluate.config import EvaluationSpec
from sae.extract import corpus, part
from sae.extract.config import PartsSpec, Source
from sae.progress import Progress, silent
from sae.store.storage.filesystem import Storage
from sae.subject import embedded
from sae.subject.config import TokenizerSpec
from sae.train import in_memory


def train_tokenizer(storage: Storage, spec: TokenizerSpec, source: Source, *, progress: Progress = silent) -> None:
    """The embedded model's tokenizer, from the training documents of its segment."""
    documents = corpus.training_texts(storage, spec.segments[0], source)
    embedded.train_tokenizer(storage, spec, documents, progress=progress)


def evaluate_sae(storage: Storage, spec: EvaluationSpec, *, progress: Progress = silent) -> None:
    """An SAE's evaluation, with the replicates it asks for trained on the spot."""
    evaluate.evaluate_sae(storage, spec, train_replicates=in_memory.train_replicates, progress=progress)


def plan_parts(storage: Storage, specs: list[PartsSpec]) -> None:
    """How many parts each hook point's activations make."""
    for spec in specs:
        part.plan_parts(storage, spec)
