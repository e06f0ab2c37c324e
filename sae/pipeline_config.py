"""The whole configuration as one document, and what its sections must agree on."""

import math
from collections.abc import Iterator
from difflib import get_close_matches
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sae.config import DeviceChoice, FrozenConfig
from sae.evaluate.config import EvaluationConfig
from sae.explain.config import ChatEndpoint, LabelsConfig
from sae.extract.config import AnyActivations, CorpusConfig, GivenActivations
from sae.report.config import ReportConfig
from sae.statistics.config import StatisticsConfig
from sae.subject.config import EmbeddedLM, SubjectConfig
from sae.train.config import MeshConfig, TrainConfig, TrainingLog
from sae.train.grid import TrainGrid, expand_grids

MAX_TEXT = 4096
"""Characters of any string: the longest path that systems take."""
MAX_TITLE = 300
"""Characters. A title is the name of flow runs and of the page."""


class NodeConfig(FrozenConfig):
    """A machine that has a share of a mesh's processes, with the same environment at the same path."""

    address: IPv4Address
    """Its own, which the other nodes reach. Nothing listens on another one."""
    command: tuple[str, ...] = ()
    """Runs what follows it there, with stdin and stdout passed through: `["ssh", "node-1"]`. Empty: on this machine."""


class RayRequest(FrozenConfig):
    """What one task of a stage has of a cluster while it runs, on one machine."""

    num_cpus: int = Field(1, gt=0, le=1024)
    """Also its torch threads, unless `execution.threads` says otherwise."""
    num_gpus: float = Field(0, ge=0, le=1024)
    """Whole ones, or a share of one that several tasks have together."""

    @field_validator("num_gpus")
    @classmethod
    def _whole_or_share(cls, number: float) -> float:
        if number > 1 and number != int(number):
            raise ValueError("a share of one GPU (0.25), or whole ones")
        return number


class RayRequests(FrozenConfig):
    """By stage."""

    subject: RayRequest = RayRequest()
    tokens: RayRequest = RayRequest()
    activations: RayRequest = RayRequest()
    sae: RayRequest = RayRequest()
    """Of every SAE of a sweep. Of every process that shares one, where `execution.mesh` has several; so are those of
    evaluation and statistics, where it has several along the latents."""
    evaluation: RayRequest = RayRequest()
    statistics: RayRequest = RayRequest()
    labels: RayRequest = RayRequest()
    report: RayRequest = RayRequest()


class RayConfig(FrozenConfig):
    """A Ray cluster that tasks run on, docs/ray.md."""

    address: str
    """`local`: this machine, started for the run and ended with it. `HOST:PORT`: a cluster's head; the run is started
    on a machine of that cluster."""
    requests: RayRequests = RayRequests()
    resource_timeout_seconds: float = Field(600.0, gt=0)
    """Tasks for which no machine has had room for so long, while none of this run had any, end the run."""

    @field_validator("address")
    @classmethod
    def _explicit(cls, address: str) -> str:
        host, colon, port = address.rpartition(":")
        if address != "local" and not (colon and host and "/" not in host and port.isdigit()):
            raise ValueError("`local`, or HOST:PORT of a cluster's head. Nothing is looked for by itself")
        return address


class ExecutionConfig(FrozenConfig):
    """Where and how it runs. Outside every fingerprint: it never changes a result."""

    # The pattern is for whoever takes parameters before this code runs: a server would store the credentials.
    root: str = Field("runs", min_length=1, json_schema_extra={"pattern": "^(?![A-Za-z0-9+.:-]+://[^/]*@)"})
    """A local folder or `s3://bucket/prefix`."""
    runner: Literal["thread", "ray"] = "thread"
    """Where tasks run: on this machine, or on the cluster of `ray`."""
    ray: RayConfig | None = None
    """Which cluster, and what tasks ask it for. Looked at when `runner` is `ray`."""
    device: DeviceChoice = "auto"
    """Where models and SAEs compute. Tasks at once take the GPUs of their machine in turn; every process of `mesh` has
    one to itself. What a GPU computes equals the CPU's results up to rounding."""
    max_workers: int = Field(2, gt=0, le=1024)
    """Tasks at once where tasks fan out (parts)."""
    threads: int | None = Field(None, gt=0, le=1024)
    """Torch threads per task. None: all cores for single tasks, cores / max_workers where tasks fan out."""
    retries: int = Field(3, ge=0, le=50)
    """Of a task whose error may pass (storage, network, a lost child process)."""
    retry_delay_seconds: float = Field(5.0, ge=0, le=86_400)
    """Before the first retry; doubled for each further one."""
    task_limit_seconds: float = Field(86_400.0, gt=0)
    """Wall-clock limit of one attempt of a task: its process is killed then, and the task is tried again."""
    checkpoint_every_steps: int = Field(200, gt=0)
    """Optimizer steps between checkpoints of a training run."""
    training_logs: tuple[TrainingLog, ...] = ()
    """Where the curves of SAEs are written, beside the store, while they are trained."""
    mesh: MeshConfig = MeshConfig()
    """Processes that share every SAE in training; those along `latents` also in its evaluation and statistics."""
    nodes: tuple[NodeConfig, ...] = ()
    """Machines of the mesh, with equally many of its processes each, neighbours along the latents. Empty: this one."""
    collective_timeout_seconds: float = Field(300.0, gt=0)
    """A process of the mesh that waits longer for the others gives up, and all are started again."""
    heartbeat_timeout_seconds: float = Field(600.0, gt=0)
    """So are they when one shows no progress for longer."""

    @property
    def n_ranks(self) -> dict[str, int]:
        """Processes that share a task, by stage, of the stages where there can be several."""
        return {"sae": self.mesh.world, "evaluation": self.mesh.latents, "statistics": self.mesh.latents}

    @model_validator(mode="after")
    def _cluster_is_named(self) -> "ExecutionConfig":
        if self.runner == "ray" and self.ray is None:
            raise ValueError('ray: runner = "ray" needs ray.address: `local`, or HOST:PORT of a cluster\'s head')
        if self.runner == "ray" and self.nodes:
            raise ValueError('nodes: with runner = "ray" the machines are those of the cluster. Leave nodes out')
        for stage, n_ranks in self.n_ranks.items():
            if self.runner != "ray" or self.ray is None or n_ranks == 1:
                continue
            if (number := getattr(self.ray.requests, stage).num_gpus) not in (0, 1):
                raise ValueError(
                    f"ray.requests.{stage}.num_gpus: {number:g}, but {n_ranks} processes share a task of this stage, "
                    f"and each has one GPU or none"
                )
        return self

    @model_validator(mode="after")
    def _mesh_fits(self) -> "ExecutionConfig":
        if self.nodes and self.mesh.world == 1:
            raise ValueError("nodes: a mesh of 1 x 1 is one process on this machine. Leave nodes out, or enlarge mesh")
        if self.nodes and self.mesh.world % len(self.nodes):
            raise ValueError(
                f"nodes: {len(self.nodes)} machines cannot have equally many of the {self.mesh.world} processes of "
                f"mesh = {self.mesh.data} x {self.mesh.latents}"
            )
        if self.heartbeat_timeout_seconds <= self.collective_timeout_seconds:
            raise ValueError(
                f"heartbeat_timeout_seconds: {self.heartbeat_timeout_seconds:g} must be more than "
                f"collective_timeout_seconds = {self.collective_timeout_seconds:g}: who waits is silent"
            )
        return self


_Entries = Annotated[tuple[TrainGrid, ...], Field(min_length=1)]
"""What may be written for `saes`; `expand_grids` makes TrainConfigs of it."""


class PipelineConfig(FrozenConfig):
    """One run, from text (or given activations) to a report. Sections carry the stages' names."""

    subject: SubjectConfig | None = None
    corpus: CorpusConfig | None = None
    activations: AnyActivations
    saes: Annotated[tuple[TrainConfig, ...], BeforeValidator(expand_grids, json_schema_input_type=_Entries)] = Field(
        min_length=1
    )
    """A sweep: all are trained from one read of the activations. An entry with a `grid` stands for many."""
    evaluation: EvaluationConfig = EvaluationConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    labels: LabelsConfig | None = None
    """Explanations of latents by a model. None: no model is asked, and no text leaves this machine for it."""
    report: ReportConfig = ReportConfig()
    seed: int = 0
    """Of the corpus order, the embedded subject and the order of rows. Each SAE has its own for its initialisation."""
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> "PipelineConfig":
        for path, value in _leaves(self.model_dump(), ()):
            if (reason := _unusable(value)) is not None:
                raise ValueError(f"{'.'.join(path)}: {reason}")
        title = self.report.title
        if len(title) > MAX_TITLE or not title.isprintable():
            raise ValueError(f"report.title: up to {MAX_TITLE} printable characters, on one line")
        if isinstance(self.activations, GivenActivations):
            if self.subject is not None or self.corpus is not None:
                raise ValueError("given activations come without a model: leave out `subject` and `corpus`")
        elif self.subject is None or self.corpus is None:
            raise ValueError("activations of a model need `subject` and `corpus`")
        for index, name in enumerate(self.hook_points):
            if name in self.hook_points[:index]:
                raise ValueError(f"activations.hook_points.{index}: {name!r} is there twice")
        self._check_saes()
        self._check_mesh()
        self._check_ray_gpus()
        self._check_concepts()
        self._check_labels()
        return self

    def _check_saes(self) -> None:
        n_rows = getattr(self.activations, "n_tokens", None)
        seen: list[TrainConfig] = []
        for index, config in enumerate(self.saes):
            where = f"saes.{index}"
            if n_rows is not None and config.batch_rows > n_rows:
                raise ValueError(
                    f"{where}.batch_rows: {config.batch_rows} is more than activations.n_tokens = {n_rows}"
                )
            hook_point = config.hook_point
            if hook_point is None and len(self.hook_points) > 1:
                raise ValueError(f"{where}.hook_point: say which of {_some(self.hook_points)} this SAE is trained on")
            if hook_point is not None and hook_point not in self.hook_points:
                near = get_close_matches(hook_point, self.hook_points, 1, 0)
                raise ValueError(
                    f"{where}.hook_point: {hook_point!r} is not extracted (did you mean {near[0]!r}? "
                    f"the activations have {_some(self.hook_points)})"
                )
            config = self.trained_on(config)
            if config in seen:
                raise ValueError(f"{where}: the same as saes.{seen.index(config)}. Remove one, or give it another seed")
            seen.append(config)

    def _check_mesh(self) -> None:
        for index, config in enumerate(self.saes):
            if (reason := self.execution.mesh.misfit(config, f"saes.{index}")) is not None:
                raise ValueError(reason)

    def _check_ray_gpus(self) -> None:
        execution = self.execution
        if execution.runner != "ray" or execution.device != "cuda":
            return
        assert execution.ray
        asked = self.labels is not None and not isinstance(self.labels.explainer, ChatEndpoint)
        computing = {
            "subject": isinstance(self.subject, EmbeddedLM),
            "activations": self.subject is not None,
            "sae": True,
            "evaluation": True,
            "statistics": True,
            "labels": asked,
        }
        for stage in (stage for stage, computes in computing.items() if computes):
            if not getattr(execution.ray.requests, stage).num_gpus:
                raise ValueError(
                    f"execution.device: a task on a Ray cluster sees the GPUs that its stage asks for, and those of "
                    f"{stage} ask for none. Set execution.ray.requests.{stage}.num_gpus, or device to auto"
                )

    def _check_concepts(self) -> None:
        if not isinstance(self.activations, GivenActivations):
            return
        for source in self.activations.sets.values():
            for index, concept in enumerate(self.evaluation.concepts):
                n_rows = len(source.values) if source.kind == "inline" else None
                bad = next((row for row in concept.rows if row < 0 or (n_rows is not None and row >= n_rows)), None)
                if bad is not None:
                    raise ValueError(f"evaluation.concepts.{index}.rows: no row {bad}, there are {n_rows}")

    def _check_labels(self) -> None:
        labels = self.labels
        if labels is None:
            return
        if isinstance(self.activations, GivenActivations):
            raise ValueError("labels: given activations come without text, so there is nothing to explain")
        wanted = labels.contexts.n_shown_per_quarter + labels.contexts.n_scored_per_quarter
        if wanted > self.statistics.n_per_group:
            raise ValueError(
                f"labels.contexts: n_shown_per_quarter + n_scored_per_quarter = {wanted} contexts of each quarter, but "
                f"statistics.n_per_group = {self.statistics.n_per_group} are kept. Raise that, or lower these"
            )
        d_sae = min(config.sae.d_sae for config in self.saes)
        for index, latent in enumerate(labels.latents or ()):
            if latent >= d_sae:
                raise ValueError(f"labels.latents.{index}: there is no latent {latent} in an SAE of d_sae = {d_sae}")

    def trained_on(self, config: TrainConfig) -> TrainConfig:
        """The config with its hook point spelled out, so that leaving it to the default gives the same name."""
        hook_point = config.hook_point or self.hook_points[0]
        return TrainConfig.model_validate(config.model_dump() | {"hook_point": hook_point})

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Hook points of the model, or the names of the given sets."""
        if isinstance(self.activations, GivenActivations):
            return tuple(self.activations.sets)
        return self.activations.hook_points


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every plain value of nested dicts and tuples with the keys that lead to it, and the keys themselves."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield path, value


def _unusable(value: Any) -> str | None:
    """Why no setting can have this value, if so."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{float(value) if abs(value) < 10**300 else 'the number'} does not fit 64 bits"
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "holds a NUL character, which no file and no database can"
    if any("\ud800" <= char <= "\udfff" for char in value):
        return "holds half of a surrogate pair, which is no character"
    if len(value) > MAX_TEXT:
        return f"{len(value)} characters, {value[:20]!r}…; up to {MAX_TEXT}"
    return None


def _some(names: tuple[str, ...]) -> str:
    """The first of some names, for messages."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
