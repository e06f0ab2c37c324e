"""Made-up latents: how often each fires, how strongly, and on which token it likes to."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from synthetic_text import Text

N_ROWS = 200_000
EDGES = 2.0 ** (np.arange(129) / 4 - 16)
POSITION_EDGES = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128])
N_TOP, N_PER_GROUP, WINDOW, LEFT = 20, 5, 32, 20
DEAD, DENSE, FEW, TWIN = 3, 5, 7, 11
"""Latents that never fire, fire on a fifth of all rows, fire three times, and have a near copy in the next one."""
KINDS = ("token", "previous token", "syntax", "position", None)
REFERENCE = np.sort(np.random.default_rng(7).gamma(2.0, size=4000))
"""Sorted activations of a latent of scale 1; every latent has this distribution, scaled."""


@dataclass(frozen=True)
class Latents:
    """What is drawn first about all latents; the tables follow from it. All [d_sae]."""

    n_fired: np.ndarray
    scale: np.ndarray
    kind: np.ndarray
    """Index into KINDS."""
    token: np.ndarray
    """The token it likes best."""
    n_on_token: np.ndarray
    """Firings on that token."""


def draw_latents(rng: np.random.Generator, d_sae: int, text: Text, has_text: bool) -> Latents:
    n_fired = np.maximum(5, (N_ROWS * 10 ** np.minimum(-1.1, rng.normal(-2.4, 0.6, d_sae))).astype(np.int64))
    n_fired[rng.random(d_sae) < 0.02] = 0
    for latent, n in ((DEAD, 0), (DENSE, N_ROWS // 5), (FEW, 3), (TWIN, 900), (TWIN + 1, 800)):
        if latent < d_sae:
            n_fired[latent] = n
    kind = rng.choice(len(KINDS), d_sae, p=[0.55, 0.15, 0.1, 0.05, 0.15]) if has_text else np.full(d_sae, 4)
    token = text.ids[rng.integers(0, len(text.ids), d_sae)]
    precise = np.where(kind == 0, rng.uniform(0.5, 1, d_sae), rng.uniform(0.02, 0.4, d_sae))
    n_on_token = np.minimum(np.ceil(precise * n_fired), np.floor(0.95 * N_ROWS * text.share[token])).astype(np.int64)
    return Latents(n_fired, 10 ** rng.normal(0.3, 0.25, d_sae), kind, token, n_on_token)


def draw_fires(rng: np.random.Generator, live: np.ndarray, n_rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents and values of some rows, strongest first; -1 and 0 where fewer fire. [n_rows, n]"""
    latents = np.sort(live[rng.integers(0, len(live), (n_rows, n))], axis=1)
    latents[:, 1:][latents[:, 1:] == latents[:, :-1]] = -1
    values = np.where(latents >= 0, rng.gamma(2.0, size=(n_rows, n)), 0)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(latents, order, 1), np.take_along_axis(values, order, 1)


def quantile(n_fired: np.ndarray, rank: np.ndarray | int) -> np.ndarray:
    """The activation of the firing of this rank, 0 being the strongest, for scale 1."""
    place = (np.maximum(n_fired - rank, 0.6) - 0.5) / np.maximum(n_fired, 1)
    return REFERENCE[np.clip((place * len(REFERENCE)).astype(np.int64), 0, len(REFERENCE) - 1)]


def ragged(values: np.ndarray, inside: np.ndarray, item: pa.DataType) -> pa.ListArray:
    """Rows of a matrix as lists of what is inside."""
    offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values[inside], item))


def ragged_bytes(ids: np.ndarray, inside: np.ndarray, text: Text) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(text.vocabulary, pa.binary()).take(pa.array(ids[inside])))


def token_lists(ids_name: str, bytes_name: str, ids: np.ndarray, inside: np.ndarray, text: Text) -> dict[str, pa.Array]:
    return {ids_name: ragged(ids, inside, pa.int32()), bytes_name: ragged_bytes(ids, inside, text)}
