"""From the whole configuration every artefact's identity, before anything runs."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sae.config import Spec
from sae.errors import InputError
from sae.evaluate.config import EvaluationConfig, EvaluationSpec
from sae.explain.config import ChatEndpoint, EndpointModel, LabelsSpec, QuestionsSpec
from sae.explain.local import pin_explainer
from sae.extract.config import (
    ActivationsConfig,
    GivenActivations,
    GivenPartsSpec,
    PartsSpec,
    RemixSpec,
    SegmentSpec,
    Source,
    Split,
    TokensSpec,
)
from sae.extract.corpus import Tally, measure_segment
from sae.extract.given import resolve_given_content
from sae.pipeline_config import ExecutionConfig, PipelineConfig
from sae.progress import Progress, silent
from sae.report.config import ReportedSAE, ReportSpec
from sae.statistics.config import StatisticsSpec
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, HFModelSpec, SubjectSpec, TokenizerSpec
from sae.subject.huggingface import resolve_pin
from sae.sweep_names import name_sweep
from sae.train.config import SAESpec, TrainConfig
from sae.train.pretrained import resolve_initial

__all__ = ["ExecutionConfig", "PipelineConfig", "Plan", "make_plan"]

AnyPartsSpec = PartsSpec | GivenPartsSpec
Place = tuple[str, Split]
"""A hook point (or given set) and a split."""


@dataclass(frozen=True)
class Plan:
    """Every artefact of a run. Names are final; nothing has been computed."""

    config: PipelineConfig
    subject: SubjectSpec | None = None
    tokenizer: TokenizerSpec | None = None
    segments: tuple[tuple[Source, SegmentSpec], ...] = ()
    tallies: tuple[Tally | None, ...] = ()
    """How much text each segment holds; None for a data set on the hub, which is not read beforehand."""
    tokens: tuple[TokensSpec, ...] = ()
    parts: dict[Place, tuple[AnyPartsSpec, ...]] = field(default_factory=dict)
    """One part set per segment."""
    snapshots: dict[Place, SnapshotSpec] = field(default_factory=dict)
    remixed: dict[str, tuple[RemixSpec, SnapshotSpec]] = field(default_factory=dict)
    """By hook point, when it is asked for: the training rows once more, mixed over all parts. Only training reads them:
    what joins rows with their text wants the parts that were extracted, each of a run of contexts."""
    saes: tuple[SAESpec, ...] = ()
    evaluations: tuple[EvaluationSpec, ...] = ()
    statistics: tuple[StatisticsSpec, ...] = ()
    questions: tuple[QuestionsSpec, ...] = ()
    labels: tuple[LabelsSpec, ...] = ()
    """One per SAE, with its questions, when labels are asked for."""
    report: ReportSpec | None = None
    control: "Plan | None" = None
    """The same on the untrained subject, up to the evaluation of the first SAE."""

    def specs(self) -> Iterator[Spec]:
        """Every artefact's spec, inputs before outputs."""
        yield from (spec for _, spec in self.segments)
        yield from (spec for spec in (self.tokenizer,) if spec)
        yield from self.tokens
        yield from (spec for spec in (self.subject,) if spec)
        for place, part_sets in self.parts.items():
            yield from part_sets
            yield self.snapshots[place]
        for remix, snapshot in self.remixed.values():
            yield from (remix, snapshot)
        yield from self.saes
        yield from self.evaluations
        yield from self.statistics
        yield from self.questions
        yield from self.labels
        yield from self.control.specs() if self.control else ()
        yield from (spec for spec in (self.report,) if spec)


MAX_PLANS = 8
_PLANS: dict[str, Plan] = {}
"""Plans by their config's JSON, without `execution`, which decides no name."""


def make_plan(config: PipelineConfig, progress: Progress = silent) -> Plan:
    """Name every artefact of a run. Reads the corpus (its identity is its content) and pins the model.

    A plan is made once in a process: what a corpus holds now is found out by a new one.

    Args:
        progress: told how much of a large corpus has been read.

    Raises: InputError when the corpus, the model or the given activations cannot be read.
    """
    key = config.model_dump_json(exclude={"execution"})
    if key not in _PLANS:
        if len(_PLANS) >= MAX_PLANS:
            _PLANS.clear()
        _PLANS[key] = _new_plan(config, progress)
    plan = _PLANS[key]
    return replace(plan, config=config, control=replace(plan.control, config=config) if plan.control else None)


def _new_plan(config: PipelineConfig, progress: Progress) -> Plan:
    given = isinstance(config.activations, GivenActivations)
    plan = _plan_given(config) if given else _plan_model(config, progress)
    plan = _with_saes(plan, config.saes)
    plan = _with_labels(plan)
    control = _plan_control(plan)
    return replace(plan, control=control, report=_report_spec(plan, control))


def _plan_model(config: PipelineConfig, progress: Progress) -> Plan:
    corpus, activations, subject_config = config.corpus, config.activations, config.subject
    assert corpus
    assert subject_config
    assert isinstance(activations, ActivationsConfig)
    measured = [measure_segment(source, corpus.heldout_fraction, progress) for source in corpus.segments]
    segments = tuple((source, spec) for source, (spec, _) in zip(corpus.segments, measured, strict=True))
    for index, (_, spec) in enumerate(segments):
        first = [earlier for _, earlier in segments].index(spec)
        if first < index:
            raise InputError(f"corpus.segments.{index}: the same documents as corpus.segments.{first}. Remove one.")
    tokenizer: TokenizerSpec | None = None
    pinned: HFModelSpec | None = None
    if isinstance(subject_config, EmbeddedLM):
        # The first segment alone trains the tokenizer and the model: an appended segment retrains neither.
        tokenizer = TokenizerSpec(vocab_size=subject_config.vocab_size, segments=(segments[0][1].ref,))
    else:
        pinned = HFModelSpec(config=subject_config, pinned=resolve_pin(subject_config))
    tokens = tuple(
        TokensSpec(
            segment=spec.ref,
            tokenizer=(tokenizer or pinned).ref,  # type: ignore[union-attr]
            context_tokens=corpus.context_tokens,
            packing=corpus.packing,
            syntax=source.kind == "stdlib",
            seed=config.seed,
        )
        for source, spec in segments
    )
    subject: SubjectSpec
    if isinstance(subject_config, EmbeddedLM):
        assert tokenizer
        subject = EmbeddedLMSpec(config=subject_config, tokenizer=tokenizer.ref, tokens=tokens[0].ref, seed=config.seed)
    else:
        assert pinned
        subject = pinned
    tallies = tuple(tally for _, tally in measured)
    plan = Plan(config, subject=subject, tokenizer=tokenizer, segments=segments, tallies=tallies, tokens=tokens)
    return _with_parts(plan, activations, config.hook_points)


def _with_parts(plan: Plan, activations: ActivationsConfig, hook_points: tuple[str, ...]) -> Plan:
    """Add the parts and snapshots of the plan's subject."""
    assert plan.subject
    assert plan.config.corpus
    splits: list[tuple[Split, int | None]] = [("train", activations.n_tokens)]
    if plan.config.corpus.heldout_fraction > 0:
        splits.append(("heldout", activations.n_heldout_tokens))
    parts: dict[Place, tuple[AnyPartsSpec, ...]] = {}
    snapshots: dict[Place, SnapshotSpec] = {}
    for hook_point in hook_points:
        for split, n_tokens in splits:
            part_sets = tuple(
                PartsSpec(
                    tokens=tokens.ref,
                    subject=plan.subject.ref,
                    split=split,
                    hook_point=hook_point,
                    dtype=activations.dtype,
                    part_bytes=activations.part_bytes,
                    row_group_bytes=activations.row_group_bytes,
                    batch_contexts=activations.batch_contexts,
                    keep_special=activations.keep_special,
                    max_norm_multiple=activations.max_norm_multiple,
                    seed=plan.config.seed,
                )
                for tokens in plan.tokens
            )
            parts[hook_point, split] = part_sets
            refs = tuple(spec.ref for spec in part_sets)
            snapshots[hook_point, split] = SnapshotSpec(parts=refs, n_tokens=n_tokens)
    return _with_remix(replace(plan, parts=parts, snapshots=snapshots), activations)


def _with_remix(plan: Plan, activations: ActivationsConfig | GivenActivations) -> Plan:
    """Add the remixed training rows of every hook point, when they are asked for."""
    if activations.remix is None:
        return plan
    remixed = {}
    for (name, split), source in plan.snapshots.items():
        if split == "train":
            spec = RemixSpec(
                source=source.ref,
                part_bytes=activations.remix.part_bytes or activations.part_bytes,
                row_group_bytes=activations.row_group_bytes,
                seed=plan.config.seed,
            )
            remixed[name] = spec, SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    return replace(plan, remixed=remixed)


def _plan_given(config: PipelineConfig) -> Plan:
    given = config.activations
    assert isinstance(given, GivenActivations)
    splits: tuple[Split, ...] = ("train", "heldout") if given.heldout_fraction > 0 else ("train",)
    parts: dict[Place, tuple[AnyPartsSpec, ...]] = {}
    snapshots: dict[Place, SnapshotSpec] = {}
    for name, source in given.sets.items():
        content = resolve_given_content(source)
        for split in splits:
            spec = GivenPartsSpec(
                source=source,
                content=content,
                split=split,
                heldout_fraction=given.heldout_fraction,
                dtype=given.dtype,
                part_bytes=given.part_bytes,
                row_group_bytes=given.row_group_bytes,
                seed=config.seed,
            )
            parts[name, split] = (spec,)
            snapshots[name, split] = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    return _with_remix(Plan(config, parts=parts, snapshots=snapshots), given)


def _with_saes(plan: Plan, configs: tuple[TrainConfig, ...]) -> Plan:
    """Add the SAEs, their evaluations and their statistics."""
    config = plan.config
    saes, evaluations, statistics = [], [], []
    for train in configs:
        train = config.trained_on(train)
        hook_point = train.hook_point
        assert hook_point
        extracted, heldout = plan.snapshots[hook_point, "train"], plan.snapshots.get((hook_point, "heldout"))
        _, read = plan.remixed.get(hook_point, (None, extracted))
        has_threshold = train.sae.architecture == "batch_topk"
        sae = SAESpec(
            config=train,
            snapshot=read.ref,
            order_seed=config.seed,
            calibration=heldout.ref if heldout and has_threshold else None,
            initial=resolve_initial(train),
        )
        saes.append(sae)
        tokens = tuple(spec.ref for spec in plan.tokens)
        subject = plan.subject.ref if plan.subject else None
        evaluations.append(
            EvaluationSpec(
                # What the control is trained on changes the control's artefacts, not this one.
                config=EvaluationConfig.model_validate(config.evaluation.model_dump() | {"untrained": None}),
                sae=sae.ref,
                architecture=train.sae,
                train_snapshot=extracted.ref,
                heldout_snapshot=heldout.ref if heldout else None,
                tokens=tokens,
                subject=subject,
                hook_point=hook_point,
                seed=config.seed,
            )
        )
        statistics.append(
            StatisticsSpec(
                config=config.statistics,
                sae=sae.ref,
                snapshots={split: spec.ref for (name, split), spec in plan.snapshots.items() if name == hook_point},
                tokens=tokens,
                subject=subject,
                hook_point=hook_point,
                seed=config.seed,
            )
        )
    return replace(plan, saes=tuple(saes), evaluations=tuple(evaluations), statistics=tuple(statistics))


def _with_labels(plan: Plan) -> Plan:
    """Add what is asked about the latents of every SAE, and the answers, when labels are asked for."""
    labels = plan.config.labels
    if labels is None:
        return plan
    explainer = labels.explainer
    model = (
        EndpointModel(model=explainer.model, temperature=explainer.temperature)
        if isinstance(explainer, ChatEndpoint)
        else pin_explainer(explainer)
    )
    questions = tuple(
        QuestionsSpec(
            contexts=labels.contexts,
            n_latents=None if labels.latents is not None else labels.n_latents,
            latents=labels.latents,
            sae=statistics.sae,
            statistics=statistics.ref,
            tokens=statistics.tokens,
            snapshot=statistics.snapshots.get("heldout") or statistics.snapshots["train"],
            window_tokens=statistics.config.context_tokens,
            seed=plan.config.seed,
        )
        for statistics in plan.statistics
    )
    answers = tuple(
        LabelsSpec(
            questions=spec.ref,
            explainer=model,
            contexts_per_request=labels.contexts_per_request,
            max_tokens=labels.max_tokens,
            seed=plan.config.seed,
        )
        for spec in questions
    )
    return replace(plan, questions=questions, labels=answers)


def _plan_control(plan: Plan) -> Plan | None:
    """The first SAE's recipe on the untrained subject, on fewer tokens, up to its evaluation."""
    untrained, subject, activations = plan.config.evaluation.untrained, plan.subject, plan.config.activations
    if untrained is None or not isinstance(subject, EmbeddedLMSpec) or subject.config.n_steps == 0:
        return None
    assert isinstance(activations, ActivationsConfig)
    n_tokens = min(untrained.n_tokens, activations.n_tokens or untrained.n_tokens)
    fewer = ActivationsConfig.model_validate(activations.model_dump() | {"n_tokens": n_tokens})
    random_weights = EmbeddedLMSpec.model_validate(
        subject.model_dump() | {"config": subject.config.model_dump() | {"n_steps": 0}}
    )
    recipe = plan.saes[0].config
    recipe = TrainConfig.model_validate(recipe.model_dump() | {"n_tokens": min(n_tokens, recipe.n_tokens or n_tokens)})
    assert recipe.hook_point
    control = Plan(plan.config, subject=random_weights, tallies=plan.tallies, tokens=plan.tokens)
    control = _with_saes(_with_parts(control, fewer, (recipe.hook_point,)), (recipe,))
    return replace(control, statistics=())  # and no labels


def _report_spec(plan: Plan, control: Plan | None) -> ReportSpec:
    names = name_sweep([sae.config for sae in plan.saes])
    entries = []
    for index, (named, sae, evaluation, statistics) in enumerate(
        zip(names, plan.saes, plan.evaluations, plan.statistics, strict=True)
    ):
        entries.append(
            ReportedSAE(
                name=named.name,
                family=named.family,
                sparsity=named.sparsity,
                sae=sae.ref,
                evaluation=evaluation.ref,
                statistics=statistics.ref,
                labels=plan.labels[index].ref if plan.labels else None,
                untrained_evaluation=control.evaluations[0].ref if control and index == 0 else None,
            )
        )
    return ReportSpec(config=plan.config.report, saes=tuple(entries))
