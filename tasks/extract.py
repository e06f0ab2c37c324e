"""Text to activations: corpus, tokenizer, subject, tokens, one task per part, snapshot."""

from collections.abc import Sequence

from prefect import task

from sae.extract import corpus, given, remix, tokens
from sae.extract.config import (
    DealtPartsSpec,
    GivenPartsSpec,
    PartsSpec,
    RemixSpec,
    SegmentSpec,
    Source,
    TokensSpec,
)
from sae.extract.part_group import extract_group
from sae.store.snapshots import snapshot
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.subject import embedded, huggingface
from sae.subject.config import EmbeddedLMSpec, HFModelSpec, TokenizerSpec
from tasks import calls
from tasks.caching import TASK_OPTIONS, Job, produce


@task(task_run_name="freeze-segment-{spec.fingerprint}", **TASK_OPTIONS)
def freeze_segment(spec: SegmentSpec, job: Job, source: Source) -> list[str]:
    """Record what a segment of the corpus is."""
    return produce(job, [spec], corpus.commit_segment, {"spec": spec, "source": source})


@task(task_run_name="train-tokenizer-{spec.fingerprint}", **TASK_OPTIONS)
def train_tokenizer(spec: TokenizerSpec, job: Job, source: Source) -> list[str]:
    """Train the embedded model's tokenizer."""
    return produce(job, [spec], calls.train_tokenizer, {"spec": spec, "source": source}, bar="tokenizer")


@task(task_run_name="train-subject-{spec.fingerprint}", **TASK_OPTIONS)
def train_subject(spec: EmbeddedLMSpec, job: Job, checkpoint_every_steps: int) -> list[str]:
    """Train the embedded language model."""
    arguments = {"spec": spec, "checkpoint_every_steps": checkpoint_every_steps}
    return produce(job, [spec], embedded.train_embedded_lm, arguments, bar="subject: training")


@task(task_run_name="pin-subject-{spec.fingerprint}", **TASK_OPTIONS)
def pin_subject(spec: HFModelSpec, job: Job) -> list[str]:
    """Pin a Hugging Face model to a revision."""
    return produce(job, [spec], huggingface.pin_subject, {"spec": spec})


@task(task_run_name="tokenize-segment-{spec.fingerprint}", **TASK_OPTIONS)
def tokenize_segment(spec: TokensSpec, job: Job, source: Source) -> list[str]:
    """Turn a segment's documents into contexts."""
    return produce(job, [spec], tokens.tokenize_segment, {"spec": spec, "source": source}, bar="tokens")


@task(task_run_name="plan-parts-{specs[0].fingerprint}", **TASK_OPTIONS)
def plan_parts(specs: Sequence[PartsSpec], job: Job) -> list[str]:
    """Decide how many parts the hook points' activations make."""
    return produce(job, specs, calls.plan_parts, {"specs": list(specs)})


@task(task_run_name="extract-parts-{parts[0][0]:05d}", **TASK_OPTIONS)
def extract_parts(specs: Sequence[PartsSpec], parts: Sequence[tuple[int, int]], job: Job) -> list[str]:
    """Run the model over some contexts; write the parts [first, stop) that every hook point has of them."""
    arguments = {"specs": list(specs), "parts": list(parts), "recompute": job.recompute}
    return produce(job, specs, extract_group, arguments, parts=[range(*each) for each in parts])


@task(task_run_name="import-activations-{spec.fingerprint}", **TASK_OPTIONS)
def import_activations(spec: GivenPartsSpec, job: Job) -> list[str]:
    """Write given activations as parts."""
    return produce(job, [spec], given.import_activations, {"spec": spec})


@task(task_run_name="commit-snapshot-{spec.fingerprint}", **TASK_OPTIONS)
def commit_snapshot(spec: SnapshotSpec, job: Job) -> list[str]:
    """Freeze the list of finished parts that training reads."""
    return produce(job, [spec], snapshot.commit_snapshot, {"spec": spec})


@task(task_run_name="deal-part-{part:05d}", **TASK_OPTIONS)
def deal_part(spec: DealtPartsSpec, part: int, job: Job) -> list[str]:
    """Deal the rows of one part to the buckets of a remix."""
    return produce(job, [spec], remix.deal_part, {"spec": spec, "part": part}, part=part)


@task(task_run_name="finish-dealing-{spec.fingerprint}", **TASK_OPTIONS)
def finish_dealing(spec: DealtPartsSpec, job: Job) -> list[str]:
    """List the dealt parts, for the buckets to be read from."""
    return produce(job, [spec, remix.dealt_snapshot(spec.remix)], remix.finish_dealing, {"spec": spec})


@task(task_run_name="gather-part-{part:05d}", **TASK_OPTIONS)
def gather_part(spec: RemixSpec, part: int, job: Job) -> list[str]:
    """Put one bucket together, mix it and write it as a part."""
    return produce(job, [spec], remix.gather_part, {"spec": spec, "part": part}, part=part)


@task(task_run_name="finish-remix-{spec.fingerprint}", **TASK_OPTIONS)
def finish_remix(spec: RemixSpec, job: Job) -> list[str]:
    """Count the rows of a remix against those that were dealt, and commit it."""
    return produce(job, [spec], remix.finish_remix, {"spec": spec})
