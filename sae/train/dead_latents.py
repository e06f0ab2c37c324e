"""Which latents are dead: a clock per latent that counts tokens since it last fired. And how they are woken."""

import torch
from torch import Tensor

from sae.train.collectives import ALONE, Collectives


class DeadLatentClock:
    """Counts rows (tokens), not steps, so the window keeps its meaning when the batch size changes. On a mesh every
    device has the clock of its own latents, and all rows count.

    Args:
        dead_after_tokens: a latent that has not fired for this many tokens is dead: AuxK works on it.

    Attributes:
        tokens_since_fired: int64 [d_sae]
    """

    def __init__(self, d_sae: int, dead_after_tokens: int, device: torch.device | str = "cpu") -> None:
        self.dead_after_tokens = dead_after_tokens
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @property
    def dead(self) -> Tensor:
        """bool [d_sae]"""
        return self.silent_for(self.dead_after_tokens)

    def silent_for(self, n_tokens: int) -> Tensor:
        """Which have not fired for so many tokens. bool [d_sae]"""
        return self.tokens_since_fired >= n_tokens

    def dead_or_none(self, shared: Collectives = ALONE) -> Tensor | None:
        """`dead`, or None while every latent of all devices is alive.

        Waits for the device: without it AuxK would be computed even while nothing is dead.
        """
        dead = self.dead
        return dead if bool(shared.sum_latents(dead.any().int())) else None

    def silent_share(self, n_tokens: int, shared: Collectives = ALONE) -> float:
        """Share of all devices' latents that have not fired for `n_tokens` tokens."""
        n_silent = shared.sum_latents(self.silent_for(n_tokens).sum())
        return int(n_silent) / (len(self.tokens_since_fired) * shared.n_latent)

    def update(self, fired: Tensor, n_rows: int) -> None:
        """Count a batch of `n_rows` rows. fired: bool [d_sae]"""
        self.tokens_since_fired.add_(n_rows).masked_fill_(fired, 0)


@torch.no_grad()
def wake(b_enc: Tensor, clock: DeadLatentClock, n_tokens: int, rise: float) -> None:
    """Raise the encoder bias of every latent that has not fired for `n_tokens` tokens, in place.

    No gradient reaches such a latent but AuxK's, which teaches it to explain what the others leave: little, and so ever
    more weakly. A bias that rises makes it fire again, in rows where little else does, and from there on the
    reconstruction teaches it. Wang et al. 2024 (arXiv:2408.15664) keep every expert of a mixture in use in this way.

    Args:
        b_enc: of the clock's latents. [d_sae]
        rise: in units of pre-activations.
    """
    b_enc.add_(clock.silent_for(n_tokens).to(b_enc.dtype), alpha=rise)
