"""How an SAE starts. Every choice comes from a generator keyed by the config's seed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.config import digest
from sae.train.collectives import ALONE, Collectives

SAMPLE_ROWS = 8192
"""Rows that the data-driven initialisations look at."""
NEIGHBOUR_COSINE = 0.98
"""Directions closer than this count as the same (density)."""
SMALL_NORM = 0.1
"""Of the decoder rows of "small"."""
BLOCK_ROWS = 1 << 14
"""Drawn at once where a device keeps only some of the rows. A multiple of 16: torch draws normal numbers by sixteens,
so blocks of any width are the same numbers as one draw."""
ENCODER_SCALE = 0.5
"""Of the tied encoder: 1 cost 4.5 % of FVU at equal tokens and 0.25 cost 2.8 %."""


def needs_sample(init: str) -> bool:
    """Whether an initialisation looks at rows of the data."""
    return init in ("farthest_point", "density", "kaiming")


def generator(purpose: str, seed: int) -> torch.Generator:
    """A generator keyed by what the numbers are for, so that no data generator of equal seed shares its stream."""
    return torch.Generator().manual_seed(int(digest([purpose, seed]), 16))


@torch.no_grad()
def initialise(
    sae: SAE, init: str, seed: int, mean: Tensor, sample: Tensor | None = None, shared: Collectives = ALONE
) -> None:
    """Fill the weights of a new SAE, or of a device's share of one: with its latents of the same whole.

    Args:
        init: `TrainConfig.init`.
        mean: of the inputs, as the SAE sees them; b_dec starts there for "tied" and "farthest_point". [d_in]
        sample: rows of the inputs as the SAE sees them, for the inits that `needs_sample`. [rows, d_in]
    """
    rng = generator("sae init", seed)
    n, own = sae.config.d_sae, shared.latents(sae.config.d_sae)
    if init == "default":
        _linear_init(sae, n, own, rng)
    elif init == "small":
        sae.W_dec.copy_(SMALL_NORM * _random_directions(n, own, sae.d_in, rng))
        sae.W_enc.copy_(sae.W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    elif init == "kaiming" and sample is not None:
        _kaiming_init(sae, n, own, rng)
        sae.b_dec.copy_(geometric_median(sample))
    else:
        centre, encoder_scale = mean, 1.0
        if init == "tied":
            directions, encoder_scale = _random_directions(n, own, sae.d_in, rng), ENCODER_SCALE
        elif sample is None:
            raise ValueError(f"init {init!r} needs a sample of the data")
        elif init == "farthest_point":
            directions = _data_directions(sample - centre, n, own, farthest_points, rng)
        else:
            # Rays start where most rows lie. With sparse features that is where none is present: the median, not
            # the mean, from which every ray is seen at an angle.
            centre = sample.median(dim=0).values
            directions = _data_directions(sample - centre, n, own, densest_directions, rng)
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(encoder_scale * directions)
        sae.b_enc.zero_()
        sae.b_dec.copy_(centre)
    if sae.unit_decoder:
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))


def farthest_points(directions: Tensor, n: int, rng: torch.Generator, first: list[int] | None = None) -> list[int]:
    """Rows chosen one by one, each the one whose largest cosine to those before it is smallest.

    Args:
        directions: unit rows. [rows, d_in]
        first: rows already chosen; a random one by default.
    Returns: at most n row numbers, no row twice.
    """
    chosen = list(first or [int(torch.randint(len(directions), (1,), generator=rng))])
    closest = (directions @ directions[chosen].T).amax(dim=1)
    closest[chosen] = torch.inf
    while len(chosen) < min(n, len(directions)):
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, directions @ directions[chosen[-1]])
        closest[chosen[-1]] = torch.inf
    return chosen[:n]


def densest_directions(directions: Tensor, n: int, rng: torch.Generator) -> list[int]:
    """Rows chosen one by one, each the one with most neighbours (cosine above 0.98) not covered by those before it.

    A feature that is alone in many rows draws a dense ray; mixtures of features are scattered. Once no row has two
    uncovered neighbours, farthest points fill up.

    Args:
        directions: unit rows. [rows, d_in]
    Returns: at most n row numbers, no row twice.
    """
    n_neighbours = _count_neighbours(directions, directions) - 1
    covered = torch.zeros(len(directions), dtype=torch.bool)
    chosen: list[int] = []
    while len(chosen) < n:
        best = int(n_neighbours.argmax())
        if n_neighbours[best] < 2:
            break
        chosen.append(best)
        near = (directions @ directions[best] > NEIGHBOUR_COSINE) & ~covered
        covered |= near
        n_neighbours -= _count_neighbours(directions, directions[near])
        n_neighbours[covered] = -1
    return farthest_points(directions, n, rng, first=chosen)


def _count_neighbours(directions: Tensor, others: Tensor) -> Tensor:
    """How many of `others` each direction has within reach. [rows] int64"""
    return torch.cat([((block @ others.T) > NEIGHBOUR_COSINE).sum(dim=1) for block in directions.split(1024)])


def _data_directions(
    centred: Tensor,
    n: int,
    own: slice,
    choose: Callable[[Tensor, int, torch.Generator], list[int]],
    rng: torch.Generator,
) -> Tensor:
    """n unit rows chosen among the directions of the data; random ones when the data has too few. [own rows, d_in]"""
    norm = centred.norm(dim=1)
    usable = norm > 1e-6 * norm.max()
    directions = centred[usable] / norm[usable, None]
    chosen = directions[choose(directions, n, rng)]
    of_rest = slice(max(0, own.start - len(chosen)), max(0, own.stop - len(chosen)))
    rest = _random_directions(n - len(chosen), of_rest, centred.shape[1], rng)
    return torch.cat([chosen[own], rest.to(chosen)])


def _random_directions(n: int, own: slice, d_in: int, rng: torch.Generator) -> Tensor:
    return F.normalize(_own_rows(lambda n_rows: torch.randn(n_rows, d_in, generator=rng), n, own), dim=1)


def _own_rows(draw: Callable[[int], Tensor], n: int, own: slice) -> Tensor:
    """Some of the rows that `draw(n)` gives, without holding all of them."""
    if own == slice(0, n):
        return draw(n)
    kept, start = [], 0
    while start < n:
        # The last block is never shorter than the others: torch draws fewer than 16 numbers in another way.
        n_rows = BLOCK_ROWS if n - start >= 2 * BLOCK_ROWS else n - start
        kept.append(draw(n_rows)[max(0, own.start - start) : max(0, own.stop - start)].clone())
        start += n_rows
    return torch.cat(kept or [draw(0)])


def geometric_median(x: Tensor, n_steps: int = 100) -> Tensor:
    """The point with the smallest mean distance to rows, by Weiszfeld's iteration. [rows, d_in] -> [d_in]"""
    rows = x.double()
    found = rows.mean(dim=0)
    for _ in range(n_steps):
        # A row at the point itself would have infinite weight; near it the others hardly matter any more.
        weight = 1 / (rows - found).norm(dim=1).clamp_min(1e-12)
        moved = weight @ rows / weight.sum()
        if float((moved - found).norm()) <= 1e-9 * float(found.norm()):
            return moved
        found = moved
    return found


def _uniform(n: int, own: slice, like: Tensor, bound: float, rng: torch.Generator) -> Tensor:
    """Own rows of n that are uniform within `bound`, shaped as those of `like`."""
    return _own_rows(lambda n_rows: torch.empty(n_rows, *like.shape[1:]).uniform_(-bound, bound, generator=rng), n, own)


def _kaiming_init(sae: SAE, n: int, own: slice, rng: torch.Generator) -> None:
    """He et al. 2015 for a ReLU: weights uniform within sqrt(6 / inputs), the two matrices apart; no encoder bias."""
    for matrix, n_inputs in ((sae.W_enc, sae.d_in), (sae.W_dec, n)):
        matrix.copy_(_uniform(n, own, matrix, (6 / n_inputs) ** 0.5, rng))
    sae.b_enc.zero_()


def _linear_init(sae: SAE, n: int, own: slice, rng: torch.Generator) -> None:
    """What `torch.nn.Linear` does: weights and biases uniform within 1 / sqrt(inputs of the layer)."""
    for parameter, n_inputs in ((sae.W_enc, sae.d_in), (sae.b_enc, sae.d_in), (sae.W_dec, n)):
        parameter.copy_(_uniform(n, own, parameter, n_inputs**-0.5, rng))
    sae.b_dec.uniform_(-(n**-0.5), n**-0.5, generator=rng)
