"""Fine-tuning: an SAE that starts from the weights of a finished one."""

import torch

from sae.architectures import SAE
from sae.errors import ConfigError, StoreError
from sae.saved import STAGE, digest_of, load, parse_address
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.train.config import Pretrained, TrainConfig
from sae.train.shares import LATENT_PARAMETERS
from sae.weights import fold_decoder_norm, fold_input_scale

NORM_TOLERANCE = 1e-3
"""Relative. Decoder rows of a saved SAE have one norm, up to the rounding of the dtype that they were stored in."""


def resolve_initial(config: TrainConfig) -> str | None:
    """What a spec says of the weights that a config starts from: an SAE of the same root, or a digest of the files.

    Raises: ConfigError or StoreError when another address holds no SAE.
    """
    if not isinstance(config.init, Pretrained):
        return None
    return config.init.weights if _in_this_root(config.init) else digest_of(config.init.weights)


def load_initial(config: TrainConfig, storage: Storage | None = None, initial: str | None = None) -> SAE | None:
    """The weights that a config starts from, in float32; None for an initialisation by a rule.

    Args:
        storage: the root of an address without one.
        initial: what `resolve_initial` said; the files must still be those.

    Raises: ConfigError or StoreError when there are none, or they have changed since.
    """
    init = config.init
    if not isinstance(init, Pretrained):
        return None
    if _in_this_root(init) and storage is not None:
        return load(storage.uri(init.weights)).float()
    if initial is not None and (found := digest_of(init.weights)) != initial:
        raise StoreError(
            f"init.weights: {init.weights} has changed since the run was planned (digest {found}, not {initial}). "
            f"Start the run again: the SAE gets another name."
        )
    return load(init.weights).float()


@torch.no_grad()
def start_from(sae: SAE, given: SAE, scale: float, name: str, shared: Collectives = ALONE) -> None:
    """Give a new SAE, or a device's share of one, the weights of a finished one.

    It computes the same, on inputs multiplied by `scale`.

    Decoder rows are brought to norm 1, their norms moved into the encoder.

    Args:
        name: of the given weights, for messages.

    Raises: ConfigError when the shapes differ, or when latents of a TopK would be ranked otherwise.
    """
    if (given.d_sae, given.d_in) != (sae.config.d_sae, sae.d_in):
        raise ConfigError(
            f"init.weights: {name} has d_sae = {given.d_sae}, d_in = {given.d_in}; to be trained is an SAE of "
            f"d_sae = {sae.config.d_sae} on activations of d_in = {sae.d_in}. Set sae.d_sae, or the hook point, to fit."
        )
    norm = given.W_dec.norm(dim=1)
    if sae.config.architecture != "standard" and float(norm.max() - norm.min()) > NORM_TOLERANCE * float(norm.max()):
        raise ConfigError(
            f"init.weights: decoder rows of {name} have norms from {norm.min():.4g} to {norm.max():.4g}, and "
            f"{sae.config.architecture} ranks latents of rows with norm 1. Divide each row by its norm and multiply "
            f"W_enc and b_enc by it."
        )
    own = shared.latents(sae.config.d_sae)
    for parameter_name, parameter in sae.named_parameters():
        start = given.get_parameter(parameter_name)
        parameter.copy_(start[own] if parameter_name in LATENT_PARAMETERS else start)
    fold_input_scale(sae, 1 / scale)
    fold_decoder_norm(sae)
    if given.subtracts_b_dec != sae.subtracts_b_dec:
        through = sae.W_enc @ sae.b_dec
        sae.b_enc.add_(through if sae.subtracts_b_dec else -through)


def _in_this_root(init: Pretrained) -> bool:
    place = parse_address(init.weights)
    return place is not None and place.stage == STAGE and place.ref == init.weights
