"""Named configs. A recipe is a function; `RECIPES` is the list that `sae-pipeline recipes` prints."""

from collections.abc import Callable

from sae.architectures.config import BatchTopKConfig, Resampling, StandardConfig, TopKConfig
from sae.evaluate.config import Concept, EvaluationConfig, Replicates
from sae.extract.config import (
    ActivationsConfig,
    CorpusConfig,
    DatasetSource,
    GivenActivations,
    InlineSource,
    SuperpositionSource,
)
from sae.plan import PipelineConfig
from sae.report.config import ReportConfig
from sae.subject.config import EmbeddedLM, HFModel
from sae.train.config import TrainConfig


def default() -> PipelineConfig:
    """The embedded one-layer model on Python's standard library: offline, minutes on a laptop."""
    return PipelineConfig(
        subject=EmbeddedLM(),
        corpus=CorpusConfig(),
        activations=ActivationsConfig(),
        saes=(TrainConfig(sae=TopKConfig(d_sae=2048, k=24)),),
        report=ReportConfig(title="One-layer transformer on Python source code"),
    )


def architectures() -> PipelineConfig:
    """The default run with every architecture from one read: topk, batch_topk, standard of 2023 and of April 2024.

    16 to 24 latents a row each, on held-out text. The two of standard are their papers' but for lambda and the learning
    rate, which were chosen on 400,000 of these rows; the papers train on billions.
    """
    return PipelineConfig(
        subject=EmbeddedLM(),
        corpus=CorpusConfig(),
        activations=ActivationsConfig(),
        saes=(
            TrainConfig(sae=TopKConfig(d_sae=2048, k=24)),
            TrainConfig(sae=BatchTopKConfig(d_sae=2048, k=24)),
            TrainConfig(
                sae=StandardConfig(d_sae=2048, l1_coefficient=3, resampling=Resampling()),
                init="kaiming",
                lr=3e-3,
                decay_fraction=0,
                warmup_fraction=0,
                adam_betas=(0.9, 0.999),
            ),
            TrainConfig(
                sae=StandardConfig(d_sae=2048, l1_coefficient=6, decoder="free", l1_warmup_fraction=0.05),
                init="small",
                input_scale="sqrt_d",
                lr=1e-3,
                max_grad_norm=1,
                warmup_fraction=0,
                adam_betas=(0.9, 0.999),
            ),
        ),
        report=ReportConfig(title="One-layer transformer on Python source code, four kinds of SAE"),
    )


TOY_TOKENS = {
    "cat": (0.8, 0.3, 0.1, 0.05),
    "happy cat": (0.82, 0.32, 0.12, 0.06),
    "dog": (0.7, 0.2, 0.05, 0.2),
    "energetic dog": (0.75, 0.3, 0.1, 0.25),
    "not cat": (0.05, 0.9, 0.4, 0.4),
    "not dog": (0.15, 0.85, 0.35, 0.5),
    "robot": (0.0, 0.7, 0.9, 0.8),
    "AI assistant": (0.1, 0.6, 0.85, 0.75),
}
"""Eight tokens with made-up activations: the smallest picture of what an SAE does."""


def toy() -> PipelineConfig:
    """Eight tokens with 4-dimensional activations: animal, robot/AI and {not cat, not dog} come apart."""
    recipe = TrainConfig(
        sae=StandardConfig(d_sae=8, l1_coefficient=0.04),
        batch_rows=8,
        n_tokens=8 * 2000,
        lr=3e-3,
        warmup_fraction=0,
        decay_fraction=0.2,
        adam_betas=(0.9, 0.999),
        init="farthest_point",
        input_scale="none",
    )
    as_published = TrainConfig.model_validate(
        recipe.model_dump()
        | {
            "sae": StandardConfig(d_sae=8, l1_coefficient=0.1, decoder="free", reduction="mean"),
            "init": "default",
            "decay_fraction": 0,
        }
    )
    return PipelineConfig(
        activations=GivenActivations(
            sets={"toy": InlineSource(values=tuple(TOY_TOKENS.values()), labels=tuple(TOY_TOKENS))}
        ),
        saes=(recipe,),
        evaluation=EvaluationConfig(
            untrained=None,
            concepts=(
                Concept(name="animal", rows=(0, 1, 2, 3)),
                Concept(name="robot / AI", rows=(6, 7)),
                Concept(name="{not cat, not dog}", rows=(4, 5)),
                Concept(name="not an animal", rows=(4, 5, 6, 7), union=True),
            ),
            replicates=Replicates(others={"the article's own initialisation and loss": as_published}),
        ),
        report=ReportConfig(title="Eight tokens, four dimensions"),
    )


def superposition() -> PipelineConfig:
    """Toy models of superposition: 20 features in 5 neurons, 6 in 2; every true feature must be recovered."""
    sets = {
        "20-in-5": SuperpositionSource(n_features=20, d_in=5, n_samples=5000, probability=0.05),
        "6-in-2": SuperpositionSource(n_features=6, d_in=2, n_samples=5000, probability=0.02),
    }
    return PipelineConfig(
        activations=GivenActivations(sets=dict(sets)),
        saes=tuple(
            TrainConfig(
                sae=TopKConfig(d_sae=source.n_features, k=1, k_aux=0),
                hook_point=name,
                init="density",
                input_scale="none",
                batch_rows=500,
                n_tokens=250_000,
                lr=2e-3,
                warmup_fraction=0,
                decay_fraction=0.5,
            )
            for name, source in sets.items()
        ),
        evaluation=EvaluationConfig(untrained=None),
        report=ReportConfig(title="Superposition: more features than neurons"),
    )


def pythia_70m() -> PipelineConfig:
    """EleutherAI/pythia-70m-deduped, residual stream after layer 3, on an uncopyrighted Pile; wants a GPU."""
    return PipelineConfig(
        subject=HFModel(name="EleutherAI/pythia-70m-deduped"),
        corpus=CorpusConfig(
            segments=(DatasetSource(name="monology/pile-uncopyrighted", n_documents=100_000),), heldout_fraction=0.01
        ),
        activations=ActivationsConfig(
            hook_points=("gpt_neox.layers.3",), n_tokens=50_000_000, part_bytes=1 << 30, row_group_bytes=32 << 20
        ),
        saes=(TrainConfig(sae=TopKConfig(d_sae=4096, k=40), batch_rows=8192),),
        report=ReportConfig(title="Pythia-70m, residual stream after layer 3"),
    )


def gpt2_small() -> PipelineConfig:
    """GPT-2 small, residual stream before layer 8, on OpenWebText; wants a GPU."""
    return PipelineConfig(
        subject=HFModel(name="openai-community/gpt2"),
        corpus=CorpusConfig(
            segments=(DatasetSource(name="Skylion007/openwebtext", n_documents=200_000),), heldout_fraction=0.01
        ),
        activations=ActivationsConfig(
            hook_points=("transformer.h.8:input",), n_tokens=100_000_000, part_bytes=1 << 30, row_group_bytes=32 << 20
        ),
        saes=(TrainConfig(sae=TopKConfig(d_sae=24_576, k=32), batch_rows=4096),),
        report=ReportConfig(title="GPT-2 small, residual stream before layer 8"),
    )


RECIPES: dict[str, Callable[[], PipelineConfig]] = {
    "default": default,
    "architectures": architectures,
    "toy": toy,
    "superposition": superposition,
    "pythia-70m": pythia_70m,
    "gpt2-small": gpt2_small,
}
