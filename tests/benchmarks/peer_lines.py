"""Measure by measure: ours, the definition's, a peer's, and the formula that gives the peer's where it differs."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sae.evaluate.cross_entropy import measure_cross_entropy
from sae.evaluate.geometry import decoder_geometry
from sae.metrics import FiringCounts, ReconstructionSums, ShrinkageSums, ce_recovered
from sae.store.text.left_out import LeftOut
from tests.benchmarks import peer_formulas as exact
from tests.benchmarks.peer_formulas import Rows
from tests.benchmarks.peer_world import HOOK_POINT, PEAKY, SPECIAL, Case, K, World

RELATIVE, ABSOLUTE = 2e-5, 1e-6
"""Tolerances: peers compute in float32, and some figures are one minus theirs."""
MEAN_OF_BATCHES = "batches: mean of the batches' figures; a short batch counts as much as a full one"
IGNORED = {"nothing ignored": (), "special ignored": (SPECIAL,)}


@dataclass(frozen=True)
class Line:
    """One measure of one peer."""

    measure: str
    ours: float
    theirs: float
    naive: float
    """By definition, in float64."""
    restated: float
    """By the formula of `why`, in float64 unless it says otherwise."""
    why: str
    """Why theirs is another number. It begins with the kind of difference: `wrong`; `batches`: it depends on how the
    rows are batched; `rounding`; `definition`: another choice, which one may prefer."""

    @property
    def equal(self) -> bool:
        """Whether the peer's figure is ours."""
        return close(self.ours, self.theirs)

    @property
    def fault(self) -> str | None:
        """What is wrong with the comparison itself."""
        if not close(self.ours, self.naive):
            return "ours is not the definition's"
        return None if self.equal or close(self.theirs, self.restated) else "the difference is not explained"


@dataclass(frozen=True)
class Figure:
    """One measure of ours."""

    measure: str
    ours: float
    naive: float

    def beside(self, name: str, theirs: float, restated: float | None = None, why: str = "") -> Line:
        """The comparison with a peer's figure of that name."""
        measure = self.measure if self.measure == name else f"{self.measure} / {name}"
        return Line(measure, self.ours, theirs, self.naive, self.naive if restated is None else restated, why)


def close(a: float, b: float) -> bool:
    """Equal but for float32 rounding; NaN equals NaN."""
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


class Measured:
    """One case, measured by us batch by batch, and by definition on all rows at once."""

    def __init__(self, world: World, case: Case, batching: str) -> None:
        self.case, self.sizes = case, world.rows_per_batch(batching)
        self.rows = Rows.of(case.sae, case.x, K)
        sums, counts, shrinkage = ReconstructionSums(), FiringCounts(case.sae.d_sae), ShrinkageSums(case.x.mean(dim=0))
        with torch.no_grad():
            for x in case.x.split(self.sizes):
                latents = case.sae.encode(x)
                x_hat = case.sae.decode(latents)
                sums.add(x, x_hat)
                shrinkage.add(x, x_hat)
                counts.add(latents)
        self.counts = counts
        self.geometry = decoder_geometry(case.sae, seed=0)
        self.fvu = Figure("FVU", sums.fvu, exact.fvu(self.rows))
        self.of_batches = Figure(
            "legacy FVU, mean of batches", sums.fvu_mean_of_batches, self.mean_of_batches(exact.fvu)
        )
        self.centred = Figure(
            "legacy FVU, centred per batch", sums.fvu_centred_per_batch, self.mean_of_batches(exact.centred_fvu)
        )
        self.mse = Figure("squared error per row", sums.squared_error / sums.n_rows, exact.squared_error(self.rows))
        self.l0 = Figure("L0", counts.l0, exact.l0(self.rows))
        self.dead = Figure("dead fraction", counts.dead_fraction, exact.dead_fraction(self.rows))
        self.gamma = Figure("gamma", shrinkage.gamma, exact.relative_bias(self.rows))
        self.norms = Figure("norm ratio", shrinkage.norm_ratio, exact.norm_ratio(self.rows))
        self.cosine = Figure("mean cosine", shrinkage.mean_cosine, exact.cosine(self.rows))

    def mean_of_batches(self, measure: Callable[[Rows], float]) -> float:
        """A measure of every batch, averaged."""
        return exact.mean_of_batches(measure, self.rows, self.sizes)


def saelens_rows(found: dict[str, Any], m: Measured) -> Iterator[Line]:
    """sae_lens/evals.py: get_sparsity_and_variance_metrics."""
    with torch.no_grad():
        cancelled = exact.float32_variance_fvu(m.case.x, m.case.sae(m.case.x), m.sizes)
    why = "rounding: variance as E||x||^2 - ||E x||^2 of float32 batch sums: digits cancel where the mean is large"
    yield m.fvu.beside("1 - explained_variance", 1 - found["explained_variance"], cancelled, why)
    yield m.mse.beside("mse", found["mse"])
    yield from _shared_rows(found, m)


def saebench_rows(found: dict[str, Any], m: Measured) -> Iterator[Line]:
    """sae_bench/evals/core/main.py: get_sparsity_and_variance_metrics, calculate_misc_metrics."""
    why = "wrong: takes (mean of x_i^2)^2 from E||x||^2, where ||E x||^2 belongs; depends on the unit of x"
    squares = exact.squared_mean_of_squares_fvu(m.rows, m.sizes)
    yield m.fvu.beside("1 - explained_variance", 1 - found["explained_variance"], squares, why)
    why = "wrong: divided by the rows of the batch, and then averaged over rows"
    yield m.mse.beside("mse", found["mse"], exact.error_over_batch_rows(m.rows, m.sizes), why)
    yield from _shared_rows(found, m)
    yield m.dead.beside("1 - frac_alive", 1 - found["frac_alive"])
    ours = m.geometry["decoder"]["mean_max_cosine"]
    nearest = Figure("decoder rows, mean max cosine", ours, exact.mean_max_cosine(m.case.sae.W_dec.detach()))
    yield nearest.beside("average_max_decoder_cosine_sim", found["average_max_decoder_cosine_sim"])


def _shared_rows(found: dict[str, Any], m: Measured) -> Iterator[Line]:
    """What SAEBench has from SAELens."""
    why = "wrong: mean over tokens of ||x - x_hat||^2 / ||x - mean of batch||^2; tokens near the mean dominate"
    legacy = 1 - found["explained_variance_legacy"]
    yield m.fvu.beside("1 - explained_variance_legacy", legacy, exact.mean_of_token_ratios(m.rows, m.sizes), why)
    yield m.l0.beside("l0", found["l0"])
    density = torch.tensor(found["feature_density"], dtype=torch.float64)
    worst = int((density - m.counts.frequency).abs().argmax())
    ours, naive = float(m.counts.frequency[worst]), float(exact.frequency(m.rows)[worst])
    yield Figure("firing frequency, latent that differs most", ours, naive).beside(
        "feature_density", float(density[worst])
    )
    why = "batches: mean of the batches' ratios"
    bias = m.mean_of_batches(exact.relative_bias)
    yield m.gamma.beside("relative_reconstruction_bias", found["relative_reconstruction_bias"], bias, why)
    why = "definition: mean over tokens of ||x_hat|| / ||x||; ours is E||x_hat|| / E||x||"
    yield m.norms.beside("l2_ratio", found["l2_ratio"], exact.mean_of_norm_ratios(m.rows), why)
    yield m.cosine.beside("cossim", found["cossim"])
    W_enc, W_dec = m.case.sae.W_enc.detach(), m.case.sae.W_dec.detach()
    tied = Figure(
        "encoder-decoder cosine",
        m.geometry["encoder_decoder_cosine"],
        exact.encoder_decoder_cosine(W_enc, W_dec),
    )
    cosines = found["encoder_decoder_cosine_sim"]
    yield tied.beside("encoder_decoder_cosine_sim", sum(cosines) / len(cosines))


def sparsify_rows(found: dict[str, Any], m: Measured) -> Iterator[Line]:
    """sparsify/sparse_coder.py: SparseCoder.forward."""
    why = "batches: every batch about its own mean, then the mean of batches"
    yield m.fvu.beside("fvu", found["fvu"], m.of_batches.naive, why)
    yield m.of_batches.beside("fvu", found["fvu"])


def dictionary_learning_rows(found: dict[str, Any], m: Measured) -> Iterator[Line]:
    """dictionary_learning/evaluation.py: evaluate."""
    theirs = 1 - found["frac_variance_explained"]
    why = "definition: var(x - x_hat) / var(x), blind to a constant error; batches: their mean"
    yield m.fvu.beside("1 - frac_variance_explained", theirs, m.centred.naive, why)
    yield m.centred.beside("1 - frac_variance_explained", theirs)
    yield m.l0.beside("l0", found["l0"], m.mean_of_batches(exact.l0), MEAN_OF_BATCHES)
    yield m.dead.beside("1 - frac_alive", 1 - found["frac_alive"])
    bias = m.mean_of_batches(exact.relative_bias)
    theirs = found["relative_reconstruction_bias"]
    yield m.gamma.beside("relative_reconstruction_bias", theirs, bias, "batches: mean of the batches' ratios")
    why = "definition: mean over tokens of ||x_hat|| / ||x||; batches: their mean"
    yield m.norms.beside("l2_ratio", found["l2_ratio"], m.mean_of_batches(exact.mean_of_norm_ratios), why)
    yield m.cosine.beside("cossim", found["cossim"], m.mean_of_batches(exact.cosine), MEAN_OF_BATCHES)


ROWS: dict[str, Callable[[dict[str, Any], Measured], Iterator[Line]]] = {
    "sae-lens": saelens_rows,
    "sae-bench": saebench_rows,
    "eai-sparsify": sparsify_rows,
    "dictionary-learning": dictionary_learning_rows,
}


class Downstream:
    """Next-token measures of one case. Activations are replaced at every token but those of `unseen_ids`."""

    def __init__(self, world: World, case: Case, unseen_ids: tuple[int, ...] = (), unembedding: float = 1.0) -> None:
        self.tokens = torch.from_numpy(world.contexts.tokens).long()
        model = copy.deepcopy(case.model)
        model.get_output_embeddings().weight.mul_(unembedding)
        mean = case.x.mean(dim=0).numpy()
        self.found = measure_cross_entropy(model, HOOK_POINT, case.sae, mean, world.contexts, LeftOut(unseen_ids))
        self.seen = ~torch.isin(self.tokens, torch.tensor(unseen_ids, dtype=torch.int64))
        model, sae = model.double(), copy.deepcopy(case.sae).double()
        self.logits = exact.variant_logits(model, HOOK_POINT, sae, self.tokens, self.seen)
        everywhere = exact.variant_logits(model, HOOK_POINT, sae, self.tokens, torch.ones_like(self.seen))
        self.zero_everywhere = self.logits | {"zero": everywhere["zero"]}

    def loss(self, variant: str) -> Figure:
        """Nats per predicted token."""
        naive = exact.token_losses(self.logits[variant], self.tokens).mean()
        return Figure(f"loss, {variant}", self.found.mean(variant), float(naive))

    @cached_property
    def recovered(self) -> Figure:
        """Share of the loss of zero ablation."""
        losses = [self.loss(variant) for variant in ("clean", "sae", "zero")]
        ours, naive = ([getattr(loss, of) for loss in losses] for of in ("ours", "naive"))
        return Figure("loss recovered, of zero ablation", ce_recovered(*ours), exact.recovered(*naive))

    def kl(self, variant: str) -> Figure:
        """Nats per predicted token."""
        naive = exact.token_kl(self.logits["clean"], self.logits[variant])[:, :-1].mean()
        return Figure(f"KL, {variant}", self.found.mean_kl(variant), float(naive))

    def loss_where_seen(self, variant: str) -> float:
        """What SAELens averages: losses after tokens that are not ignored; zero in place of every activation."""
        losses = exact.token_losses(self.zero_everywhere[variant], self.tokens)
        return float(losses[self.seen[:, :-1]].mean())

    def kl_where_seen(self, variant: str) -> float:
        """What SAELens averages: at every position that is not ignored, the last one too."""
        kl = exact.token_kl(self.zero_everywhere["clean"], self.zero_everywhere[variant])
        return float(kl[self.seen].mean())


SAELENS_LOSSES = {"clean": "ce_loss_without_sae", "sae": "ce_loss_with_sae", "zero": "ce_loss_with_ablation"}
SAELENS_KL = {"sae": "kl_div_with_sae", "zero": "kl_div_with_ablation"}


def saelens_downstream(found: dict[str, float], d: Downstream) -> Iterator[Line]:
    """get_downstream_reconstruction_metrics of sae_lens/evals.py and of sae_bench/evals/core/main.py."""
    why = "definition: leaves out the losses after ignored tokens"
    for variant, name in SAELENS_LOSSES.items():
        also = "; zero at ignored tokens too" if variant == "zero" else ""
        yield d.loss(variant).beside(name, found[name], d.loss_where_seen(variant), why + also)
    theirs = exact.recovered(*(d.loss_where_seen(variant) for variant in SAELENS_LOSSES))
    yield d.recovered.beside("ce_loss_score", found["ce_loss_score"], theirs, why + "; zero at ignored tokens too")
    for variant, name in SAELENS_KL.items():
        why = "definition: counts the last position, whose token has no successor here; leaves out ignored ones"
        yield d.kl(variant).beside(name, found[name], d.kl_where_seen(variant), why)


def dictionary_learning_downstream(found: dict[str, float], d: Downstream, sizes: list[int]) -> Iterator[Line]:
    """dictionary_learning/evaluation.py: loss_recovered, and evaluate for the mean of batches."""
    why = "definition: leaves out targets that are the pad token, to nnsight the end-of-text one; batches: their mean"
    names = {"clean": "loss_original", "sae": "loss_reconstructed", "zero": "loss_zero"}
    counted = (d.tokens[:, 1:] != SPECIAL).split(sizes)
    batches = {
        variant: [
            float(losses[kept].mean())
            for losses, kept in zip(exact.token_losses(d.logits[variant], d.tokens).split(sizes), counted, strict=True)
        ]
        for variant in names
    }
    for variant, name in names.items():
        restated = sum(batches[variant]) / len(sizes)
        yield d.loss(variant).beside(name, found[name], restated, why)
    recovered = [exact.recovered(*losses) for losses in zip(*batches.values(), strict=True)]
    yield d.recovered.beside("frac_recovered", found["frac_recovered"], sum(recovered) / len(sizes), why)


def confident_lines(found: dict[str, dict[str, Any]], world: World, case: Case) -> Iterator[tuple[str, Line]]:
    """KL of a subject some of whose probabilities are zero in float32: (peer, line)."""
    d = Downstream(world, case, unembedding=PEAKY)
    figure = Figure(f"KL, sae, unembedding x {PEAKY:g}", d.found.mean_kl("sae"), d.kl("sae").naive)
    why = "definition: counts the last position, whose token has no successor here"
    yield "sae-lens", figure.beside("kl_div_with_sae", found["sae-lens"]["peaky_kl"], d.kl_where_seen("sae"), why)
    why = "wrong: takes the logarithm of a softmax in float32; 0 (log 0 - log 0) is not a number"
    yield "sae-bench", figure.beside("kl_div_with_sae", found["sae-bench"]["peaky_kl"], math.nan, why)
