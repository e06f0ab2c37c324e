"""dictionary_learning's trainSAE, with its trainers."""

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from training import Batches, Case, Reconstruct, Weights, report

TRAINERS = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer, "standard": StandardTrainer}


def train(case: Case, batches: Batches) -> tuple[Weights, Reconstruct]:
    trainers = []

    def make(**settings: object) -> object:
        trainers.append(TRAINERS[case.architecture](**settings))
        return trainers[-1]

    settings = {"lr": case.lr, "warmup_steps": case.warmup_steps}
    if case.decay_steps is not None:
        settings["decay_start"] = case.n_steps - case.decay_steps
    options = {} if case.architecture == "standard" else {"k": case.k}
    config = {
        "trainer": make,
        "steps": case.n_steps,
        "activation_dim": case.d_in,
        "dict_size": case.d_sae,
        "layer": 0,
        "lm_name": "given",
        "device": "cpu",
        "seed": case.seed,
        **options,
        **{name: value for name, value in settings.items() if value is not None},
    }
    trainSAE(batches, [config], steps=case.n_steps, device="cpu")
    dictionary = trainers[0].ae
    weights = {
        "W_enc": dictionary.encoder.weight,
        "b_enc": dictionary.encoder.bias,
        "W_dec": dictionary.decoder.weight.T,
        "b_dec": dictionary.b_dec if case.architecture != "standard" else dictionary.bias,
    }
    return weights, dictionary


if __name__ == "__main__":
    report("dictionary-learning", train)
