"""One device's share of an SAE that several train together: some of its latents, and all of b_dec."""

from typing import cast

import torch
from torch import Tensor, nn

from sae.architectures import SAE, SAEConfig, build_sae
from sae.train.collectives import Collectives

LATENT_PARAMETERS = ("W_enc", "W_dec", "b_enc")
"""A row for every latent: each device has those of its own. b_dec has the same bits on all of them."""


def build_share(config: SAEConfig, d_in: int, shared: Collectives) -> SAE:
    """The share of this device, with all weights zero: an SAE of fewer latents than its config says.

    Raises: ConfigError when the devices cannot share the latents evenly.
    """
    own = shared.latents(config.d_sae)
    with torch.device("meta"):  # the whole may not fit into memory
        sae = build_sae(config, d_in)
    sae.d_sae = own.stop - own.start
    for name, parameter in list(sae.named_parameters()):
        shape = (sae.d_sae, *parameter.shape[1:]) if name in LATENT_PARAMETERS else parameter.shape
        setattr(sae, name, nn.Parameter(torch.zeros(shape)))
    for name, buffer in list(sae.named_buffers()):
        setattr(sae, name, torch.zeros(buffer.shape))
    return sae


def gather_whole(share: SAE, shared: Collectives) -> SAE | None:
    """The whole SAE on the first device, None elsewhere. share: on the CPU."""
    tensors = {
        name: shared.gather_latents(parameter.detach()) if name in LATENT_PARAMETERS else parameter.detach()
        for name, parameter in share.named_parameters()
    }
    if shared.rank > 0:
        return None
    with torch.device("meta"):
        whole = build_sae(share.config, share.d_in)
    for name, tensor in tensors.items():
        setattr(whole, name, nn.Parameter(cast(Tensor, tensor), requires_grad=False))
    for name, buffer in share.named_buffers():
        setattr(whole, name, buffer)
    return whole
