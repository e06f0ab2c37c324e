"""The formulas of docs/conformance.md, and that each mistake that implementations make there would be seen."""

import functools

import pytest

from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.topk import TopKSAE
from sae.metrics import ReconstructionSums
from sae.train.dead_latents import DeadLatentClock
from sae.train.init import initialise
from sae.train.losses import auxk_loss, batch_topk_losses, l1_loss, standard_losses, topk_losses
from sae.train.resampling import _draw, resample
from sae.train.run import TrainingRun, _input_scale
from sae.train.schedule import warmed_up
from sae.train.step import apply_gradients
from sae.train.threshold import _cut, calibrate
from sae.weights import fold_decoder_norm, fold_input_scale
from tests.sae.conformance import hand_worked, training
from tests.sae.conformance.planted import Mutation, planted

STEPS = {name: functools.partial(training.steps, name) for name in training.FORMS}
CHECKS = {f"six steps of {name}": check for name, check in STEPS.items()} | {
    check.__name__: check
    for check in (
        training.run_2023,
        training.run_2024,
        hand_worked.standard_2023,
        hand_worked.standard_2024,
        hand_worked.topk,
        hand_worked.topk_of_few_positive,
        hand_worked.batch_topk,
        hand_worked.batch_topk_at_inference,
        hand_worked.threshold,
        hand_worked.dead_clock,
        hand_worked.fvu_of_offset_data,
        hand_worked.geometric_median,
        hand_worked.resampled_latent,
        hand_worked.resampled_inputs,
    )
}

TARGET = "-error.detach(), dead"
PROJECTION = "    if sae.unit_decoder:\n        remove_parallel_component(sae.W_dec)\n"
RENORMALISATION = "    if sae.unit_decoder:\n        renormalise(sae.W_dec)\n"
BETWEEN_BATCHES = "self.squared_deviation += float(shift.square().sum()) * self.n_rows * other.n_rows / n_rows"
CUT = "threshold = between if bool(between < last) else following"
MUTATIONS = {
    "AuxK: the target is not detached, topk": Mutation(topk_losses, TARGET, "-error, dead", STEPS["topk"]),
    "AuxK: the target is not detached, batch_topk": Mutation(
        batch_topk_losses, TARGET, "-error, dead", STEPS["batch_topk"]
    ),
    "AuxK: decoded with b_dec, which the target lacks, topk": Mutation(
        topk_losses, TARGET, "-error.detach() - sae.b_dec, dead", STEPS["topk"]
    ),
    "AuxK: decoded with b_dec, which the target lacks, batch_topk": Mutation(
        batch_topk_losses, TARGET, "-error.detach() - sae.b_dec, dead", STEPS["batch_topk"]
    ),
    "AuxK: not divided by the residual's variance": Mutation(
        auxk_loss, "error / variance.clamp_min(torch.finfo(variance.dtype).tiny)", "error", hand_worked.topk
    ),
    "AuxK: all dead latents instead of k_aux": Mutation(
        auxk_loss, "min(k_aux, len(W_dec))", "len(W_dec)", STEPS["topk"]
    ),
    "TopK: a selected latent may be negative": Mutation(
        TopKSAE.select, "values.relu()", "values", hand_worked.topk_of_few_positive
    ),
    "BatchTopK: k of the batch instead of k per row": Mutation(
        BatchTopKSAE.select_batch, "len(pre_acts) * self.config.k", "self.config.k", hand_worked.batch_topk
    ),
    "BatchTopK: the batch decides at inference": Mutation(
        BatchTopKSAE.activate,
        "pre_acts > self.threshold",
        "pre_acts >= pre_acts.flatten().topk(len(pre_acts) * self.config.k).values.min()",
        hand_worked.batch_topk_at_inference,
    ),
    "theta: a running mean that starts at 0": Mutation(
        calibrate,
        "sae.threshold.fill_(threshold)",
        "sae.threshold.lerp_(torch.tensor(threshold), 0.01)",
        hand_worked.threshold,
    ),
    "theta: the smallest value kept, which is not above itself": Mutation(
        _cut, CUT, "threshold = last", hand_worked.threshold
    ),
    "unit decoder: no projection before Adam, standard": Mutation(
        apply_gradients, PROJECTION, "", STEPS["standard 2023"]
    ),
    "unit decoder: no projection before Adam, topk": Mutation(apply_gradients, PROJECTION, "", STEPS["topk"]),
    "unit decoder: no norm of 1 after the step": Mutation(apply_gradients, RENORMALISATION, "", STEPS["topk"]),
    "dead clock: counts steps": Mutation(DeadLatentClock.update, "add_(n_rows)", "add_(1)", hand_worked.dead_clock),
    "dead clock: counts steps, seen by AuxK": Mutation(
        DeadLatentClock.update, "add_(n_rows)", "add_(1)", STEPS["batch_topk"]
    ),
    "FVU: the data is not centred": Mutation(
        ReconstructionSums.add, "(x - mean).square()", "x.square()", hand_worked.fvu_of_offset_data
    ),
    "FVU: every batch about its own mean": Mutation(
        ReconstructionSums.merge, BETWEEN_BATCHES, "pass", hand_worked.fvu_of_offset_data
    ),
    "FVU: of the centred error, averaged over batches": Mutation(
        ReconstructionSums.fvu.fget,
        "self.squared_error / self.squared_deviation if",
        "self._batch_centred_ratios / self.n_batches if",
        hand_worked.fvu_of_offset_data,
    ),
    "lambda: error averaged over dimensions, L1 summed": Mutation(
        standard_losses, "mse * sae.d_in", "mse", STEPS["standard 2023"]
    ),
    "lambda: L1 summed over rows": Mutation(
        l1_loss, "latents.mean(dim=0)", "latents.sum(dim=0)", hand_worked.standard_2023
    ),
    "lambda: not weighed by the norms of a free decoder": Mutation(
        standard_losses, "None if sae.unit_decoder else sae.W_dec.norm(dim=1)", "None", STEPS["standard 2024"]
    ),
    "lambda: inputs are not scaled": Mutation(
        TrainingRun.advance, "x = x.to(self.device) * self.scale", "x = x.to(self.device)", training.run_2023
    ),
    "lambda: E ||x||^2 = d instead of E ||x|| = sqrt(d)": Mutation(
        _input_scale, ".norm(dim=1).mean())", ".square().sum(dim=1).mean().sqrt())", training.run_2024
    ),
    "lambda: not warmed up": Mutation(warmed_up, "min(1.0, (step + 1) / warmup_steps)", "1.0", training.run_2024),
    "fold: decoder norms leave the encoder as it is": Mutation(
        fold_decoder_norm, "sae.W_enc.mul_(norm[:, None])", "sae.W_enc.mul_(1)", training.run_2024
    ),
    "fold: the input scale leaves b_dec as it is": Mutation(
        fold_input_scale, "sae.b_dec.div_(scale)", "sae.b_dec.div_(1)", training.run_2023
    ),
    "init: the mean instead of the geometric median": Mutation(
        initialise, "geometric_median(sample)", "mean", hand_worked.geometric_median
    ),
    "resampling: drawn by the loss instead of its square": Mutation(
        _draw, ".double().square()", ".double()", hand_worked.resampled_inputs
    ),
    "resampling: the encoder row has the whole norm": Mutation(
        resample, "ENCODER_SHARE * norm * directions", "norm * directions", hand_worked.resampled_latent
    ),
    "resampling: the norm is that of all latents": Mutation(
        resample,
        "norms[~silent] if n_silent < n_latents else norms",
        "norms",
        hand_worked.resampled_latent,
    ),
    "resampling: the bias stays": Mutation(resample, "sae.b_enc[which] = 0", "pass", hand_worked.resampled_latent),
    "resampling: Adam remembers": Mutation(resample, "moment[which] = 0", "pass", hand_worked.resampled_latent),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_library_does_what_the_papers_say(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_seen(name: str) -> None:
    mutation = MUTATIONS[name]
    mutation.check()
    with planted(mutation), pytest.raises(AssertionError):
        mutation.check()
    mutation.check()
