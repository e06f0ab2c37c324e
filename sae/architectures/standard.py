"""ReLU latents (Bricken et al. 2023, Towards Monosemanticity; Anthropic's April 2024 update with a free decoder)."""

from torch import Tensor

from sae.architectures.base import SAE
from sae.architectures.config import StandardConfig


class StandardSAE(SAE):
    """f = ReLU(W_enc (x - b_dec) + b_enc); x_hat = f W_dec + b_dec. With a free decoder nothing is subtracted.

    Attributes:
        l1_coefficient: lambda in force. The config's, but while training warms it up.
    """

    config: StandardConfig

    def __init__(self, config: StandardConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.l1_coefficient = config.l1_coefficient

    @property
    def subtracts_b_dec(self) -> bool:
        """The 2023 form does; the April 2024 form (`decoder="free"`) does not."""
        return self.config.decoder == "unit"

    @property
    def unit_decoder(self) -> bool:
        """As configured."""
        return self.config.decoder == "unit"

    def activate(self, pre_acts: Tensor) -> Tensor:
        """ReLU."""
        return pre_acts.relu()
