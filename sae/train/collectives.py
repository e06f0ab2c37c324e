"""What devices that share one SAE tell each other.

They form a mesh of two axes. Devices along the latent axis have the same rows and different latents of the SAE, those
along the data axis the same latents and other rows. Every device calls the methods in the same order, with tensors of
the same shape unless it says otherwise.
"""

import torch
from torch import Tensor

from sae.store.artefacts.group import Group


class Neighbours:
    """Devices of one host that need the same rows: the first reads them from storage and tells the others.

    Of one device alone.

    Attributes:
        reads: whether it is this device that reads.
    """

    reads = True

    def tell_rows(self, rows: Tensor | None, numbers: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
        """What the one that reads has read.

        Args:
            rows: None on the others. float32 [rows, d_in]
            numbers: as many on all; those of the one that reads count.
            device: where the rows are and are to be.
        """
        assert rows is not None
        return rows, numbers


class Collectives(Group):
    """Of one device alone, which has all latents and all rows: there is nothing to tell.

    `sae.train.mesh.Mesh` overrides all of it.

    Attributes:
        data_rank, n_data: which share of every batch is this device's.
        latent_rank, n_latent: which share of the latents.
        same_batch: the devices of this host that have the same rows of every batch.
        same_host: all devices of this host.
    """

    data_rank = latent_rank = 0
    n_data = n_latent = 1
    same_batch = same_host = Neighbours()

    def latents(self, d_sae: int) -> slice:
        """The latents of this device. Raises: ConfigError when the mesh cannot share so many evenly."""
        return slice(0, d_sae)

    def sum_latents(self, partial: Tensor) -> Tensor:
        """Sum over the devices that have the other latents of the same rows; may change `partial`."""
        return partial

    def norm_latents(self, norm: Tensor) -> Tensor:
        """Euclidean norms of the whole from those of every device's own latents."""
        return norm

    def sum_rows(self, total: Tensor) -> Tensor:
        """Sum over the devices that have other rows; may change `total`."""
        return total

    def any_rows(self, flags: Tensor) -> Tensor:
        """Whether a flag is set on any device that has other rows. bool; may change `flags`."""
        return flags

    def among_largest_of_row(self, values: Tensor, k: int) -> Tensor | None:
        """Which of the largest values that this device has of every row are among the k largest of all devices'.

        Exactly k of every row are, over all devices that have its latents; of those that tie for the last place, the
        ones of the first devices.

        Args:
            values: in any order; another number of columns on another device, at most k. [rows, columns]
            k: at most as many as all devices have together.

        Returns: bool [rows, columns]; None: all of them.
        """
        return None

    def among_largest_of_batch(self, values: Tensor, n: int) -> Tensor | None:
        """Which of this device's values are among the n largest of all devices, rows and latents.

        Exactly n are, or all when there are fewer; of those that tie for the last place, the ones of the first devices.

        Args:
            values: all positive, any number of them. [values]

        Returns: bool [values]; None: all of them.
        """
        return None

    def nth_largest_of_batch(self, values: Tensor, n: int) -> Tensor | None:
        """The n-th largest of all devices' values; None when they have fewer. values: as above."""
        # Not kthvalue: where values descend, as a threshold's do, it takes the square of their number.
        return values.topk(n, sorted=False).values.amin() if n <= len(values) else None

    def sum_all(self, total: Tensor) -> Tensor:
        """Sum over all devices; may change `total`."""
        return self.sum_rows(self.sum_latents(total))

    def gather_latents(self, own: Tensor) -> Tensor | None:
        """All latents' rows of a tensor of the CPU on the first device, None elsewhere. [own latents, ...]"""
        return own

    def from_first(self, tensor: Tensor) -> Tensor:
        """What the first of the devices with the same rows has, on all of them; may change `tensor`."""
        return tensor

    def to_first(self, own: Tensor) -> Tensor:
        """Of the devices with the same rows, all tensors end to end on the first, none elsewhere.

        Args:
            own: another length on another device. [n, ...]
        """
        return own


ALONE = Collectives()
