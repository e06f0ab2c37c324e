"""Feature statistics against the sparse encode that they cannot do without, and their memory over many rows."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sae.architectures import build_sae
from sae.architectures.base import SAE
from sae.architectures.config import TopKConfig
from sae.statistics.accumulate import LatentSums, Sizes
from sae.statistics.firings import BLOCK_ROWS, Block, Rows, context_key, document_key
from tests.benchmarks.timing import Row, compare, resident_bytes

D_IN, D_SAE, K, CONTEXT_TOKENS, VOCAB = 512, 2048, 24, 128, 2048
N_BLOCKS = 32
"""Of 8,192 rows: 262,144 in all."""
ROWS_PER_PART = 250_000
"""Of the measurement of memory: several parts even at 1 M rows, so that a merge is in either peak."""


def statistics(folder: Path) -> Iterator[Row]:
    """Rows/s of encode and every per-latent statistic, over the encode alone; then memory at 1 M and 20 M rows."""
    sae = random_sae(D_IN, D_SAE, K)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((BLOCK_ROWS, D_IN), np.float32))

    def ours() -> None:
        sums = LatentSums(_sizes(D_SAE))
        for number in range(N_BLOCKS):
            sums.add("train", encoded_block(sae, x.roll(number, 1), number, VOCAB))
        sums.top.read(), sums.sample.read(), sums.places.read()

    @torch.inference_mode()
    def encode() -> None:
        for number in range(N_BLOCKS):
            sae.encode_sparse(x.roll(number, 1))

    rows = float(BLOCK_ROWS * N_BLOCKS)
    yield compare("statistics of a part / bare sparse encode", ours, encode, rows, "rows", n_pairs=5)
    sizes = [_peak_mib(millions) for millions in (1, 20)]
    what = "statistics: peak memory at 20 M rows / at 1 M rows"
    yield Row(what, f"{sizes[1]:,.0f} MiB", f"{sizes[0]:,.0f} MiB", (sizes[1] / sizes[0],))


def random_sae(d_in: int, d_sae: int, k: int) -> SAE:
    """A TopK SAE with random unit directions, tied."""
    generator = torch.Generator().manual_seed(0)
    sae = build_sae(TopKConfig(d_sae=d_sae, k=k), d_in)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1))
        sae.W_enc.copy_(sae.W_dec)
    return sae


@torch.inference_mode()
def encoded_block(sae: SAE, x: torch.Tensor, number: int, vocab_size: int) -> Block:
    """Rows as `iter_blocks` yields them, with made-up text."""
    place = np.arange(number * len(x), (number + 1) * len(x))
    token = (place * 2654435761 >> 7) % vocab_size
    rows = Rows(
        context=context_key(0, "train", place // CONTEXT_TOKENS),
        pos=(place % CONTEXT_TOKENS).astype(np.int32),
        doc=document_key(0, place // 6000),
        token=token.astype(np.int32),
        previous=np.roll(token, 1).astype(np.int32),
        label=(token % 20).astype(np.uint8),
    )
    sparse = sae.encode_sparse(x)
    return Block(rows, sparse.row.numpy(), sparse.latent.numpy().astype(np.int32), sparse.value.numpy())


def _sizes(d_sae: int) -> Sizes:
    return Sizes(d_sae, 20, 64, 0, row_share=0.05, vocab_size=VOCAB, n_labels=20, context_tokens=CONTEXT_TOKENS)


def _peak_mib(millions: int) -> float:
    """Peak resident memory of a process that accumulates so many rows, part by part, saved and merged."""
    command = [sys.executable, "-m", "tests.benchmarks.statistics", str(millions)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _accumulate(millions: int) -> None:
    import tempfile

    sae = random_sae(32, 1024, 16)
    blocks_per_part = ROWS_PER_PART // BLOCK_ROWS
    n_parts = millions * 1_000_000 // ROWS_PER_PART
    share = 65_536 / (n_parts * ROWS_PER_PART)
    sizes = _sizes(1024)._replace(row_share=share)
    generator = torch.Generator().manual_seed(0)
    whole = LatentSums(sizes)
    with tempfile.TemporaryDirectory() as folder:
        for part in range(n_parts):
            sums = LatentSums(sizes)
            for number in range(part * blocks_per_part, (part + 1) * blocks_per_part):
                x = torch.randn(BLOCK_ROWS, 32, generator=generator)
                sums.add("train", encoded_block(sae, x, number, VOCAB))
            sums.save(Path(folder) / "part")
            whole.merge_file(Path(folder) / "part")
    print(resident_bytes("VmHWM") / (1 << 20))


if __name__ == "__main__":
    _accumulate(int(sys.argv[1]))
