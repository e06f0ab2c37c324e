"""What devices that share one SAE tell each other within a step."""

from torch import Tensor


class Collectives:
    """Of one device alone, which has all latents and all rows: there is nothing to tell.

    A mesh of devices overrides both. Every device calls them in the same order with tensors of the same shape, and
    each has equally many rows.
    """

    def sum_latents(self, partial: Tensor) -> Tensor:
        """Sum over the devices that have the other latents of the same rows; may change `partial`."""
        return partial

    def mean_rows(self, mean: Tensor) -> Tensor:
        """Mean over the devices that have other rows; may change `mean`."""
        return mean


ALONE = Collectives()
