"""Corpora, tokens and activations: what is extracted, and into which parts."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sae.config import FrozenConfig, Ref, Spec
from sae.store.part.encoding import Dtype

Split = Literal["train", "heldout"]

MAX_PART_BYTES = 1 << 36
"""A part is made in memory."""
MAX_ROW_GROUP_BYTES = 1 << 29
"""A row group is one page of the file, and a page is smaller than 1 GiB."""


class StdlibSource(FrozenConfig):
    """Python's own standard library sources: real text on every machine. About 370 files, 7.8 MB."""

    kind: Literal["stdlib"] = "stdlib"
    max_documents: int | None = Field(None, gt=0)
    """Only the first files, in order of their paths (for quick runs)."""


class FilesSource(FrozenConfig):
    """Text, jsonl or Parquet files by fsspec URL (globs allowed). One document per text file, line or row."""

    kind: Literal["text", "jsonl", "parquet"]
    urls: tuple[str, ...] = Field(min_length=1)
    text_field: str = "text"
    """The key or column that holds the text (jsonl, parquet)."""


class DatasetSource(FrozenConfig):
    """A Hugging Face data set, streamed. Needs the extra `datasets`."""

    kind: Literal["huggingface"] = "huggingface"
    name: str = Field(min_length=1)
    """Hub name, or the path of a local folder of data files."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    n_documents: int = Field(gt=0)
    """How many documents, from the start: a stream has no end that could be recorded."""


Source = Annotated[StdlibSource | FilesSource | DatasetSource, Field(discriminator="kind")]


class CorpusConfig(FrozenConfig):
    """An append-only list of segments and how their documents become contexts."""

    segments: tuple[Source, ...] = Field((StdlibSource(),), min_length=1)
    """Contexts are packed, held out and permuted within a segment: a new one leaves the old parts as they are."""
    context_tokens: int = Field(128, ge=8)
    """Tokens per context."""
    packing: bool = True
    """Concatenate documents, separated by the tokenizer's BOS or EOS token. False: a document per context, padded."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their names, that no training sees."""


class RemixConfig(FrozenConfig):
    """A second shuffle of the training rows, over all parts: any stretch of what is stored is then a random sample.

    It reads and writes everything twice, keeps a second copy of the training rows, and needs room for a third while it
    works. See docs/remix.md: the shuffle at reading seldom leaves anything to gain.
    """

    part_bytes: int | None = Field(None, gt=0, le=MAX_PART_BYTES)
    """Bytes of vectors in a remixed part, at most; one is mixed in memory at a time. None: as extracted."""


class ActivationsConfig(FrozenConfig):
    """Which activations are read from the model, and how they are stored."""

    kind: Literal["model"] = "model"
    hook_points: tuple[str, ...] = Field(("gpt_neox.layers.0.mlp.act",), min_length=1)
    """Module paths; the output is read, or with the suffix `:input` what goes in."""
    n_tokens: int | None = Field(1_000_000, gt=0)
    """Training tokens to extract, rounded up to whole parts. None: all."""
    n_heldout_tokens: int | None = Field(200_000, gt=0)
    """Held-out tokens to extract, rounded up to whole parts. None: all."""
    dtype: Dtype = "float16"
    """float16 is right for nearly all: where values exceed 32752, a part records a power of two that they are divided
    by. bfloat16 for those of a bfloat16 model as they are; int8 takes half the room, with a scale per dimension."""
    part_bytes: int = Field(64 << 20, gt=0, le=MAX_PART_BYTES)
    """Bytes of vectors in a part, the unit of work and of repair: at most so many, in a power of two of batches, and at
    least one batch. 1 GiB for large stores."""
    row_group_bytes: int = Field(4 << 20, gt=0, le=MAX_ROW_GROUP_BYTES)
    """Bytes of vectors in a row group, the unit of reading. 32 MiB for large stores."""
    batch_contexts: int = Field(32, gt=0)
    """Contexts per forward pass. Part of the identity: another batch gives other bits."""
    keep_special: bool | tuple[str, ...] = False
    """Whether activations at special tokens are stored: none, all, or at those named, by role (`bos`, `eos`, `sep`,
    `cls`, `mask`) or as they are spelled (`<|im_start|>`). Padding never is; what is left out is counted."""
    max_norm_multiple: float | None = Field(10.0, ge=2, allow_inf_nan=False)
    """Rows whose norm is more than so many times the median norm of their part are left out and counted: attention
    sinks. Contexts are packed, so most begin in the middle of a document, and their first token takes the place that
    BOS has in training: models put a norm tens of times the usual there, which would rule the mean, the input scale and
    the loss of an SAE. Where there are none (in the embedded model) nothing is left out. None: all rows are stored."""
    remix: RemixConfig | None = None
    """Mix the training rows over all parts once more. None: they lie as they were extracted, mixed within parts."""


class InlineSource(FrozenConfig):
    """Vectors written in the config itself."""

    kind: Literal["inline"] = "inline"
    values: tuple[tuple[float, ...], ...] = Field(min_length=2)
    """Rows of equal length: [rows, d_in]."""
    labels: tuple[str, ...] | None = None
    """A name for each row, shown in the report."""

    @model_validator(mode="after")
    def _rows_agree(self) -> "InlineSource":
        widths = {len(row) for row in self.values}
        if len(widths) != 1:
            raise ValueError(f"rows have different lengths: {sorted(widths)}")
        if self.labels is not None and len(self.labels) != len(self.values):
            raise ValueError(f"{len(self.labels)} labels for {len(self.values)} rows")
        return self


class ArraySource(FrozenConfig):
    """Vectors in a .npy, .safetensors or .parquet file (fsspec URL): [rows, d_in]."""

    kind: Literal["file"] = "file"
    url: str = Field(min_length=1)
    name: str = "act"
    """The tensor (safetensors) or column (parquet) that holds the vectors."""


class SuperpositionSource(FrozenConfig):
    """The hidden activations of a toy model of superposition (Elhage et al. 2022), trained here: its true features
    are known, so recovery can be measured."""

    kind: Literal["superposition"] = "superposition"
    n_features: int = Field(20, gt=1)
    d_in: int = Field(5, gt=1)
    n_samples: int = Field(5000, gt=1)
    probability: float = Field(0.05, gt=0, lt=1)
    """That a feature is present in a sample; its size is uniform on [0, 1]."""


GivenSource = Annotated[InlineSource | ArraySource | SuperpositionSource, Field(discriminator="kind")]


class GivenActivations(FrozenConfig):
    """Bring your own activations: named sets instead of hook points; no text, no model."""

    kind: Literal["given"] = "given"
    sets: dict[str, GivenSource] = Field(min_length=1)
    """Name -> source. The name takes the place of the hook point."""
    heldout_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the rows, from the end, kept for evaluation. 0: evaluated on the training rows, and said so."""
    dtype: Dtype = "float32"
    part_bytes: int = Field(64 << 20, gt=0, le=MAX_PART_BYTES)
    row_group_bytes: int = Field(4 << 20, gt=0, le=MAX_ROW_GROUP_BYTES)
    remix: RemixConfig | None = None


def _activations_kind(value: Any) -> str:
    kind = value.get("kind", "model") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind)


AnyActivations = Annotated[
    Annotated[ActivationsConfig, Tag("model")] | Annotated[GivenActivations, Tag("given")],
    Discriminator(_activations_kind),
]
"""A model's activations unless `kind` says "given"."""


class SegmentSpec(Spec):
    """A frozen set of documents. Its identity is their content, not where they lie."""

    stage: ClassVar[str] = "segments"
    code_version: ClassVar[int] = 1

    kind: str
    documents: str
    """Digest of the documents in order: names and text. For a data set stream: of its pinned revision and size."""
    heldout_fraction: float


class TokensSpec(Spec):
    """A segment's contexts: packed, split by document, permuted."""

    stage: ClassVar[str] = "tokens"
    code_version: ClassVar[int] = 1

    segment: Ref
    tokenizer: Ref
    """`tokenizers/...` of the embedded model, or `subjects/...` of a Hugging Face model."""
    context_tokens: int
    packing: bool
    syntax: bool
    """Whether documents are Python sources, whose tokens get syntax labels."""
    seed: int


class PartsSpec(Spec):
    """The parts of one hook point over one split of one segment. Part k is a pure function of this and k."""

    stage: ClassVar[str] = "parts"
    code_version: ClassVar[int] = 3

    tokens: Ref
    subject: Ref
    split: Split
    hook_point: str
    dtype: Dtype
    part_bytes: int
    row_group_bytes: int
    batch_contexts: int
    keep_special: bool | tuple[str, ...]
    max_norm_multiple: float | None = None
    seed: int


class GivenPartsSpec(Spec):
    """The parts of a set of given activations."""

    stage: ClassVar[str] = "parts"
    code_version: ClassVar[int] = 2
    parts_at_once: ClassVar[bool] = True

    source: GivenSource
    content: str
    """Digest of the values for files; empty where the source itself says everything."""
    split: Split
    heldout_fraction: float
    dtype: Dtype
    part_bytes: int
    row_group_bytes: int
    seed: int


class RemixSpec(Spec):
    """The rows of a snapshot as other parts, each a random sample of all of them. Part k is a pure function of this."""

    stage: ClassVar[str] = "parts"
    code_version: ClassVar[int] = 1

    source: Ref
    """The snapshot."""
    part_bytes: int
    row_group_bytes: int
    seed: int


class DealtPartsSpec(Spec):
    """Work in progress of a remix: each part of its source with the rows grouped by the part they go to."""

    stage: ClassVar[str] = "parts"
    code_version: ClassVar[int] = 1

    remix: RemixSpec

    @property
    def inputs(self) -> dict[str, str]:
        """Those of the remix."""
        return self.remix.inputs
