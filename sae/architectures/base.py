"""What every sparse autoencoder has: four tensors, and encode, decode and forward over them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae.architectures.config import SAEConfig
from sae.errors import InputError

AmongLargest = Callable[[Tensor, int], Tensor | None]
"""(values [rows, columns], k) -> which of them are among the k largest of their row on all devices; None: all."""


class SparseLatents(NamedTuple):
    """The positive latents of some rows, as parallel vectors sorted by row, then by latent."""

    row: Tensor
    """Row in the batch. int64 [n]"""
    latent: Tensor
    """int64 [n]"""
    value: Tensor
    """Activation, always positive. [n], dtype of the SAE"""

    def to(self, device: torch.device | str) -> "SparseLatents":
        """The same on a device."""
        return SparseLatents(*(column.to(device) for column in self))


class SAE(nn.Module, ABC):
    """A sparse autoencoder. Architectures subclass it, and never each other.

    Weights start at zero: `sae.train` initialises them, `load_sae` reads them. Any float dtype and device.

    Attributes:
        config: the architecture's config.
        W_enc, W_dec: [d_sae, d_in]
        b_enc: [d_sae]
        b_dec: [d_in]
    """

    def __init__(self, config: SAEConfig, d_in: int) -> None:
        super().__init__()
        self.config: SAEConfig = config
        self.d_in = d_in
        self.d_sae = config.d_sae
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    @abstractmethod
    def subtracts_b_dec(self) -> bool:
        """Whether the encoder sees x - b_dec (a pre-bias) or x."""

    @property
    @abstractmethod
    def unit_decoder(self) -> bool:
        """Whether training keeps the rows of W_dec at norm 1."""

    @abstractmethod
    def activate(self, pre_acts: Tensor) -> Tensor:
        """Latents from pre-activations, by the inference rule. [..., d_sae] -> [..., d_sae], none negative."""

    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations. [..., d_in] -> [..., d_sae]. Raises: InputError for another width, dtype or device."""
        self._check_activations(x)
        if not self.subtracts_b_dec:
            return F.linear(x, self.W_enc, self.b_enc)
        # The bias gets its gradient through a term that is zero: a product of a matrix and a vector, where
        # differentiating x - b_dec would cost another product of the size of the forward pass.
        constant = self.b_dec.detach()
        return F.linear(x - constant, self.W_enc, self.b_enc + self.W_enc.detach() @ (constant - self.b_dec))

    def encode(self, x: Tensor) -> Tensor:
        """Latents. [..., d_in] -> [..., d_sae]. Raises: InputError when x has another width."""
        return self.activate(self.pre_acts(x))

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The positive latents of rows [rows, d_in]. Raises: InputError when x has another shape or width."""
        self._check_rows(x)
        latents = self.encode(x)
        row, latent = torch.nonzero(latents, as_tuple=True)
        return SparseLatents(row, latent, latents[row, latent])

    def encode_own(self, x: Tensor, among_largest: AmongLargest) -> SparseLatents:
        """`encode_sparse` of an SAE that has some of the latents of another: what the other finds among these.

        Architectures whose latents compete for a place ask all devices who gets it; here every latent is for itself.
        """
        return self.encode_sparse(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction. [..., d_sae] -> [..., d_in]. Raises: InputError for another width, dtype or device."""
        self._check_input(latents)
        if latents.shape[-1] != self.d_sae:
            raise InputError(f"{latents.shape[-1]} latents given to an SAE of d_sae = {self.d_sae}")
        return latents @ self.W_dec + self.b_dec

    def decode_sparse(self, sparse: SparseLatents, n_rows: int) -> Tensor:
        """Reconstruction of `n_rows` rows from their positive latents. [n_rows, d_in]"""
        return self.sum_decoder_rows(sparse, n_rows) + self.b_dec

    def sum_decoder_rows(self, sparse: SparseLatents, n_rows: int) -> Tensor:
        """Their reconstruction without b_dec. [n_rows, d_in]"""
        starts = torch.searchsorted(sparse.row, torch.arange(n_rows, device=sparse.row.device))
        return F.embedding_bag(
            sparse.latent, self.W_dec, starts, mode="sum", per_sample_weights=sparse.value.to(self.W_dec.dtype)
        )

    def _check_activations(self, x: Tensor) -> None:
        self._check_input(x)
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"activations of width {x.shape[-1]} given to an SAE of d_in = {self.d_in}. "
                f"It was trained on another hook point or another model."
            )

    def _check_input(self, given: Tensor) -> None:
        if not isinstance(given, Tensor):
            raise InputError(
                f"a {type(given).__name__} given to an SAE, which takes tensors [..., d]: torch.as_tensor(x)"
            )
        if given.ndim == 0 or given.layout != torch.strided:
            found = "a single number" if given.ndim == 0 else "a sparse tensor"
            raise InputError(f"{found} given to an SAE, which takes dense tensors [..., d]")
        for kind in ("dtype", "device"):
            found, wanted = (str(getattr(each, kind)).removeprefix("torch.") for each in (given, self.W_enc))
            if found != wanted:
                target = f"torch.{wanted}" if kind == "dtype" else repr(wanted)
                raise InputError(f"{found} given to an SAE of {wanted}. Convert one of them: x.to({target})")

    def _check_rows(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.ndim != 2:
            raise InputError(
                f"sparse latents are those of rows [rows, d_in], not of {list(x.shape)}: x.reshape(-1, {self.d_in})"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x. [..., d_in] -> [..., d_in]"""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """What tells it from others of its class when it is printed."""
        sparsity = self.config.sparsity
        return f"d_in={self.d_in}, d_sae={self.d_sae}, {sparsity}={getattr(self.config, sparsity):g}"
