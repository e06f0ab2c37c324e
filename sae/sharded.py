"""An SAE whose latents lie on several devices, used as one.

The first of the devices leads: it does what is to be done with the SAE, which is evaluation or statistics as ever.
Where that asks for the latents of some rows, or for their reconstruction, all devices answer for the latents that they
have. What a rank receives on L devices, for b rows of width d, p positive latents and numbers of s bytes:

    rows                 b d s, from the first
    the k largest of a row (topk)    as in training
    latents              p (16 + s), to the first; for a reconstruction, from the first
    reconstruction       2 b d s (L - 1) / L
    n nearest decoder rows    12 n of each latent of the others, to the first

Before each of these the first tells three numbers, by which the others also learn that it is still there.
"""

import enum
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sae.architectures.base import SAE, SparseLatents
from sae.errors import StopRequested, TransientError
from sae.progress import Progress, silent
from sae.statistics import decoder
from sae.statistics.decoder import Ranked
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.weights import SavedWeights, read_weights

BLOCK_ELEMENTS = 1 << 24
"""Pre-activations that a device holds at once (64 MiB)."""
ALIVE_SECONDS = 10.0
"""How often the others hear from the first device while it asks nothing of them."""
Work = Callable[[SAE, Progress], object]


def with_sae(
    storage: Storage,
    ref: str,
    work: Work,
    *,
    device: torch.device | str = "cpu",
    shared: Collectives = ALONE,
    progress: Progress = silent,
) -> None:
    """Do `work(sae, progress)` with an SAE of the store, in float32 on a device.

    Every device reads its own latents' weights. The first one does the work, and must call the `progress` that it is
    given more often than collectives may take; the others return when it is done. One that is asked to stop is enough.

    Args:
        device: this process's. The SAE of several processes is one of the CPU to the work: what it is asked goes to the
            device, and the answer comes back.
        shared: the devices; those along the data axis are not needed, and would do the same.

    Raises: what the work raises, on the first device; on the others TransientError; StopRequested on all.
    """
    with records.local_files(storage, records.require_record(storage, ref)) as folder:
        weights = read_weights(folder)
        share = weights.sae(shared.latents(weights.config.d_sae)).float().to(device)
    if shared.n_latent == 1:
        work(share, progress)
        return
    line = _Line(share, weights, shared, progress)
    if shared.latent_rank > 0:
        line.answer()
        return
    try:
        work(ShardedSAE(weights, line), line.progress)
    except BaseException as err:
        line.close(_Word.STOPPED if isinstance(err, StopRequested) else _Word.FAILED)
        raise
    line.close(_Word.DONE)


class ShardedSAE(SAE):
    """All latents, to the device that leads; its tensors are the file that they were saved in, read where needed."""

    def __init__(self, weights: SavedWeights, line: "_Line") -> None:
        with torch.device("meta"):
            super().__init__(weights.config, weights.d_in)
        for name in [name for name, _ in self.named_parameters()]:
            setattr(self, name, nn.Parameter(weights.tensors[name].to(line.share.W_dec.dtype), requires_grad=False))
        self._line = line

    @property
    def subtracts_b_dec(self) -> bool:
        """As the architecture."""
        return self._line.share.subtracts_b_dec

    @property
    def unit_decoder(self) -> bool:
        """As the architecture."""
        return self._line.share.unit_decoder

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As the architecture."""
        return self._line.share.activate(pre_acts)

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """By all devices, some rows at a time."""
        self._check_rows(x)
        self._check_activations(x)
        n_rows = max(1, BLOCK_ELEMENTS // self._line.share.d_sae)
        found = []
        for start in range(0, max(len(x), 1), n_rows):
            sparse = self._line.encode(x[start : start + n_rows])
            found.append(sparse._replace(row=sparse.row + start))
        return SparseLatents(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def encode(self, x: Tensor) -> Tensor:
        """Dense, from what all devices found."""
        sparse = self.encode_sparse(x.reshape(-1, x.shape[-1]))
        latents = x.new_zeros(x[..., 0].numel(), self.d_sae)
        latents[sparse.row, sparse.latent] = sparse.value
        return latents.view(*x.shape[:-1], self.d_sae)

    def sum_decoder_rows(self, sparse: SparseLatents, n_rows: int) -> Tensor:
        """By all devices."""
        return self._line.decode(sparse, n_rows)

    def forward(self, x: Tensor) -> Tensor:
        """By all devices."""
        rows = x.reshape(-1, x.shape[-1]).cpu()  # a model that this is spliced into may be elsewhere
        return self.decode_sparse(self.encode_sparse(rows), len(rows)).view(x.shape).to(x.device)

    def nearest_decoders(self, n: int, progress: Progress = silent) -> Ranked:
        """By all devices: each compares its own latents with all, a block of decoder rows of the file at a time."""
        n_own, found = self._line.share.d_sae, []
        n_devices = self.d_sae // n_own
        for rows in decoder.blocks(slice(0, n_own), self.d_sae):
            found.append([column.unflatten(0, (n_devices, -1)) for column in self._line.nearest(rows.start, n)])
            progress(rows.stop * n_devices, self.d_sae, "latents", "neighbours")
        return Ranked(*(torch.cat(column, dim=1).flatten(0, 1) for column in zip(*found, strict=True)))


def nearest_decoders(sae: SAE, n: int, progress: Progress = silent) -> Ranked:
    """As the function of `sae.statistics.decoder`, by all devices that have latents of the SAE."""
    if isinstance(sae, ShardedSAE):
        return sae.nearest_decoders(n, progress)
    return decoder.nearest_decoders(sae.W_dec, n, progress)


class _Word(enum.IntEnum):
    """What the first device asks of the others."""

    WAIT = 0
    ENCODE = 1
    DECODE = 2
    NEAREST = 3
    DONE = 4
    FAILED = 5
    STOPPED = 6


class _Line:
    """Between the first device and the others: it asks, and all of them answer in the same order.

    Args:
        share: the SAE of this device's latents.
        weights: of all latents.
    """

    def __init__(self, share: SAE, weights: SavedWeights, shared: Collectives, progress: Progress) -> None:
        self.share, self._weights, self._shared, self._progress = share, weights, shared, progress
        self._own = shared.latents(share.config.d_sae)
        self._last_asked = time.monotonic()
        self._answered = True
        """Whether the last question was. Where it was not, the others may be anywhere, and no other would be heard."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """That of the first device, which now and then tells the others that it is there."""
        self._progress(done, total, unit, note)
        if time.monotonic() - self._last_asked > ALIVE_SECONDS:
            self._ask(_Word.WAIT)
            self._answered = True

    def encode(self, x: Tensor) -> SparseLatents:
        """Ask for the latents of rows. x: [rows, d_in]"""
        self._ask(_Word.ENCODE, len(x))
        found = self._encode(x.to(self.share.W_dec.device))
        self._answered = True
        return found.to(x.device)

    def decode(self, sparse: SparseLatents, n_rows: int) -> Tensor:
        """Ask for sums of decoder rows. [n_rows, d_in]"""
        self._ask(_Word.DECODE, n_rows, len(sparse.row))
        summed = self._decode(sparse.to(self.share.W_dec.device), n_rows)
        self._answered = True
        return summed.to(sparse.value.device)

    def nearest(self, start: int, n: int) -> Ranked:
        """Ask every device for the nearest decoder rows of a block of its latents. Both [devices * rows, n]

        Args:
            start: of the block, counted from each device's first latent.
        """
        self._ask(_Word.NEAREST, start, n)
        found = self._nearest(start, n)
        self._answered = True
        return found

    def close(self, word: _Word) -> None:
        """Let the others go, if they are still there."""
        if self._answered:
            self._ask(word)

    def answer(self) -> None:
        """On the other devices: do what the first one asks until it is done. Raises: as `with_sae`."""
        weights, n_answers = self.share.W_dec, 0
        while True:
            stop = False
            try:
                self._progress(n_answers, n_answers + 1, "answers")
            except StopRequested:
                stop = True
            word, first, second = self._hear(stop=stop)
            if word == _Word.DONE:
                return
            if word == _Word.FAILED:
                raise TransientError("the rank that leads could not do its work: its own error says why.")
            if word == _Word.STOPPED:
                raise StopRequested("the rank that leads was asked to stop")
            if word == _Word.ENCODE:
                self._encode(weights.new_empty(first, self.share.d_in))
            if word == _Word.DECODE:
                row, latent = torch.empty(2, second, dtype=torch.int64, device=weights.device)
                self._decode(SparseLatents(row, latent, weights.new_empty(second)), first)
            if word == _Word.NEAREST:
                self._nearest(first, second)
            n_answers += 1

    def _ask(self, word: _Word, first: int = 0, second: int = 0) -> None:
        self._last_asked, self._answered = time.monotonic(), False
        self._hear(word, first, second)

    def _hear(self, word: int = 0, first: int = 0, second: int = 0, stop: bool = False) -> list[int]:
        """What the first device says: the others say nothing, but they may wish to stop."""
        *said, n_wishes = self._shared.sum_latents(torch.tensor([word, first, second, int(stop)])).tolist()
        if n_wishes and said[0] < _Word.DONE:
            raise StopRequested("a rank that has some of the latents was asked to stop")
        return said

    def _encode(self, x: Tensor) -> SparseLatents:
        """All latents on the first device, none elsewhere. x: elsewhere of the same shape."""
        row, latent, value = self.share.encode_own(self._shared.from_first(x), self._shared.among_largest_of_row)
        row, latent, value = map(self._shared.to_first, (row, latent + self._own.start, value))
        by_row = row.sort(stable=True)  # the devices are in the order of their latents
        return SparseLatents(by_row.values, latent[by_row.indices], value[by_row.indices])

    def _decode(self, sparse: SparseLatents, n_rows: int) -> Tensor:
        """The sum over all latents on every device. sparse: elsewhere of the same length."""
        row, latent, value = map(self._shared.from_first, sparse)
        own = (latent >= self._own.start) & (latent < self._own.stop)
        mine = SparseLatents(row[own], latent[own] - self._own.start, value[own])
        return self._shared.sum_latents(self.share.sum_decoder_rows(mine, n_rows))

    def _nearest(self, start: int, n: int) -> Ranked:
        """Those of all devices on the first, none elsewhere."""
        W_dec = self._weights.tensors["W_dec"]
        rows = next(decoder.blocks(slice(self._own.start + start, self._own.stop), len(W_dec)))
        return Ranked(*map(self._shared.to_first, decoder.nearest_to(W_dec, rows, n, self.share.W_dec.device)))
