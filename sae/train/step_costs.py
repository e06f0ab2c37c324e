"""What a step costs one rank of a mesh, by arithmetic: bytes received, memory held, work done.

The bytes are those that `Mesh.received` counts; tests hold both to each other. Memory is that of the tensors, within a
few percent. The work is what the formulas of `selection.py` and `backward.py` multiply and move, with equal shares of
the pairs for all ranks.

Everywhere b is a rank's rows of a batch, n its latents, d = d_in, and numbers are float32 of s = 4 bytes.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from sae.architectures.config import StandardConfig
from sae.train.backward import DENSE_AUXK_ON_GPU
from sae.train.config import MeshConfig, TrainConfig
from sae.train.largest import DIGIT_BITS
from sae.train.selection import SLABS, tile_rows

DEVICE = "cuda"
"""What meshes are planned for."""
ITEMSIZE = 4
"""Of float32: weights, gradients, moments, activations, and what is told of them."""
DEAD_SHARE = 0.1
"""Of the latents, dead while memory is at its peak. An assumption; AuxK copies the rows of the dead ones."""
BATCHES_READ = 2
"""Of the loader: the one in use, and the next on its way to the device."""
PAIR_BYTES = 60
"""Of a (row, latent) pair while gradients are made: its numbers by row and by latent, weights, derivatives."""
CANDIDATE_BYTES = 12
"""Of a candidate of a row: value and latent."""
TRAVELLING_BYTES = 30
"""Of a candidate on a latent axis, more: the copies that are sent and seen, and what is kept."""

STEP_KERNELS, TILE_KERNELS = 100, 16
"""Launched in a step, about, and for every tile of it."""
ROW_PASSES = 16
"""Over a rank's rows of d numbers: scaled, centred, decoded, compared, squared, differentiated."""

Axis = Literal["latents", "data", "all"]

AXES: dict[str, Axis] = {
    "among_largest_of_batch": "all",
    "among_largest_of_row": "latents",
    "any_rows": "data",
    "norm_latents": "latents",
    "sum_latents": "latents",
    "sum_rows": "data",
}
"""Between which ranks what a method of `Collectives` tells travels."""


class Memory(NamedTuple):
    """Bytes of one SAE's share on one rank."""

    weights: int
    """With the running mean, when one is kept, and the dead clock."""
    gradients: int
    """They stay until the next step has made its own."""
    moments: int
    """Adam's two."""
    step: int
    """Activations, tiles, pairs and copies at a step's peak. SAEs side by side take their steps in turn."""
    batches: int
    """Rows as they are read; SAEs side by side share them."""

    @property
    def kept(self) -> int:
        """From step to step."""
        return self.weights + self.gradients + self.moments


class Work(NamedTuple):
    """What a rank computes in a step."""

    flops: float
    """Of the dense products."""
    dtype: Literal["float32", "bfloat16"]
    """Theirs."""
    product_bytes: float
    """That they read and write, while they multiply."""
    moved_bytes: float
    """That everything else reads and writes: tiles, pairs, projection, Adam."""
    n_kernels: int
    """Launched, about."""


def received_bytes(config: TrainConfig, d_in: int, mesh: MeshConfig, *, dead: bool = False) -> Counter[str]:
    """What a rank receives in a step, by the method of `Collectives` that tells it. dead: as of `collectives`."""
    found: Counter[str] = Counter()
    for method, n_bytes in collectives(config, d_in, mesh, dead=dead):
        found[method] += n_bytes
    return found


def collectives(config: TrainConfig, d_in: int, mesh: MeshConfig, *, dead: bool = False) -> Iterator[tuple[str, int]]:
    """Those of a step between two ranks or more: the method of `Collectives`, and the bytes a rank receives by it.

    An all-reduce counts as the ring that it is.

    Args:
        dead: so are some latents, more than k_aux: AuxK is at work.
    """
    sae, b, d, s = config.sae, config.batch_rows // mesh.data, d_in, ITEMSIZE
    n = sae.d_sae // mesh.latents

    def reduced(method: str, *sizes: int) -> Iterator[tuple[str, int]]:
        n_ranks = ranks_along(AXES[method], mesh)
        yield from ((method, 2 * size * (n_ranks - 1) // n_ranks) for size in sizes if n_ranks > 1)

    def candidates(k: int, itemsize: int) -> Iterator[tuple[str, int]]:
        # From every other rank b / L rows, and back a threshold and a number of ties for its own.
        n_rows = (b // mesh.latents) * (mesh.latents - 1)
        yield from (("among_largest_of_row", n_rows * size) for size in (k * itemsize, itemsize + 4) if n_rows)

    yield from reduced("sum_latents", 4, s, d * s)  # whether any is dead, L0, b_dec through the encoder
    if isinstance(sae, StandardConfig):
        height = tile_rows(n * s, DEVICE)
        yield from reduced("sum_latents", *(min(height, b - start) * d * s for start in range(0, b, height)), s)
    else:
        yield from reduced("sum_latents", b * d * s)
        selected = 2 if config.selection == "bfloat16" else s
        if sae.architecture == "topk":
            yield from candidates(sae.k, selected)
        else:
            digits = (1 << min(top, DIGIT_BITS) for top in range(8 * selected - 1, 0, -DIGIT_BITS))
            yield from reduced("among_largest_of_batch", *(8 * count for count in digits), 8 * mesh.world)
        if dead and sae.k_aux > 0:
            yield from reduced("sum_latents", 8, b * d * s)
            yield from reduced("sum_rows", d * s, s)
            yield from candidates(sae.k_aux, s)
    yield from reduced("sum_rows", n * d * s, n * d * s, n * s, d * s, 4 * s)
    yield from reduced("any_rows", n)
    if config.max_grad_norm is not None:
        yield from reduced("norm_latents", 3 * s)


def told_rows_bytes(config: TrainConfig, d_in: int, mesh: MeshConfig) -> int:
    """Rows of a batch that a rank receives from the neighbour that reads them, where one of its host does."""
    return config.batch_rows // mesh.data * d_in * ITEMSIZE


def ranks_along(axis: Axis, mesh: MeshConfig) -> int:
    """Ranks of a group."""
    return {"latents": mesh.latents, "data": mesh.data, "all": mesh.world}[axis]


def memory(config: TrainConfig, d_in: int, mesh: MeshConfig) -> Memory:
    """Bytes of tensors on a rank; what libraries keep for themselves is not counted."""
    sae, b, s, d = config.sae, config.batch_rows // mesh.data, ITEMSIZE, d_in
    n = sae.d_sae // mesh.latents
    selected = 2 if config.selection == "bfloat16" else s
    tile_height = min(tile_rows(n * selected, DEVICE), b)
    rows, matrix, tile = b * d * s, n * d * s, tile_height * n * selected
    parameters = 2 * matrix + (n + d) * s
    mean = 0 if config.ema_decay is None else parameters
    # Gradients are made one by one, each while the one before it is there: one matrix more.
    if isinstance(sae, StandardConfig):
        step = 3 * rows + max(3 * tile, matrix)
    else:
        travelling = TRAVELLING_BYTES if mesh.latents > 1 else 0
        candidates = b * sae.k * (CANDIDATE_BYTES + travelling)
        pairs = b * sae.k * PAIR_BYTES // mesh.latents
        in_slabs = tile_height * SLABS * sae.k * CANDIDATE_BYTES  # whose latents are looked at once more
        selecting = 2 * rows + tile + tile // SLABS + in_slabs
        if config.selection == "bfloat16":
            selecting += matrix // 2
        if sae.architecture == "batch_topk":  # of all rows of the batch: any device may have the largest
            candidates = min(config.batch_rows * sae.k, b * n) * CANDIDATE_BYTES
            selecting += candidates + tile_height * n
        step = max(selecting, 4 * rows + matrix + pairs) + candidates
        if sae.k_aux > 0:
            step = max(step, candidates + pairs + _auxk_memory(sae.k_aux, n, b, d, mesh))
    return Memory(parameters + mean + 8 * n, parameters, 2 * parameters, step, BATCHES_READ * rows)


def _auxk_memory(k_aux: int, n: int, b: int, d: int, mesh: MeshConfig) -> int:
    """Bytes that AuxK adds to the pairs of a step: copies of both matrices' rows, their gradients, its own pairs."""
    n_dead = int(DEAD_SHARE * n)
    per_row = min(k_aux, n_dead)
    found = 6 * b * d * ITEMSIZE + 4 * n_dead * d * ITEMSIZE
    found += b * per_row * (CANDIDATE_BYTES + (TRAVELLING_BYTES if mesh.latents > 1 else 0))
    if n_dead > DENSE_AUXK_ON_GPU * per_row:
        return found + b * per_row * PAIR_BYTES // mesh.latents
    return found + 3 * b * n_dead * ITEMSIZE


def work(config: TrainConfig, d_in: int, mesh: MeshConfig) -> Work:
    """What a rank computes in a step, dead latents left out. Of `standard` while many latents are positive."""
    sae, b, s, d = config.sae, config.batch_rows // mesh.data, ITEMSIZE, d_in
    n = sae.d_sae // mesh.latents
    itemsize = 2 if config.selection == "bfloat16" else s
    matrix, rows, n_tiles = n * d * s, b * d * s, -(-b // tile_rows(n * itemsize, DEVICE))
    pre_acts, n_kernels = b * n * s, STEP_KERNELS + TILE_KERNELS * n_tiles
    # Adam reads weight, gradient and moments and writes all but the gradient; of both matrices.
    moved = 2 * 7 * matrix + ROW_PASSES * rows
    if getattr(sae, "decoder", "unit") == "unit":
        moved += (2 + 3 + 1 + 2) * matrix  # along the row; taken away; norms; divided
    if config.max_grad_norm is not None:
        moved += 2 * 3 * matrix
    if config.ema_decay is not None:
        moved += 2 * 3 * matrix
    if isinstance(sae, StandardConfig):
        # Of every tile: three products read a matrix, two add to a gradient; its pre-activations are gone over nine
        # times, bias, ReLU, counts, sums, signs and penalty.
        product_bytes = n_tiles * (3 + 2 * 2) * matrix + 5 * pre_acts
        return Work(10.0 * b * n * d, "float32", product_bytes, moved + 9 * pre_acts, n_kernels)
    pair_rows = b * sae.k * d * s // mesh.latents
    moved += 4 * pair_rows + 2 * matrix  # decoded, their derivative, two gradients
    moved += 3 * pre_acts * itemsize // s  # bias added, maxima of slabs
    if config.selection == "bfloat16":
        moved += 2 * pair_rows + (s + itemsize) * n * d  # pre-activations once more; the encoder in bfloat16
    return Work(2.0 * b * n * d, config.selection, (n_tiles * n * d + b * n) * itemsize, moved, n_kernels)
