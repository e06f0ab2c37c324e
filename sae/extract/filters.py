"""Which rows of a model's activations are not stored: at padding, at special tokens, and attention sinks."""

from typing import Any

import numpy as np

from sae.errors import InputError

ROLES = ("bos", "eos", "sep", "cls", "pad", "mask", "unk")
"""What transformers calls the tokens that most tokenizers have."""


def dropped_ids(tokenizer: Any, special_ids: list[int], keep: bool | tuple[str, ...]) -> list[int]:
    """Ids of the special tokens whose activations are left out.

    Args:
        special_ids: all tokens that stand for no text.
        keep: none of them (False), all, or those named: by role (ROLES) or as they are spelled.

    Raises: InputError when the tokenizer has no special token of that name.
    """
    if isinstance(keep, bool):
        return [] if keep else list(special_ids)
    named = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    named = {role: token for role, token in named.items() if token in special_ids}
    named |= {str(tokenizer.convert_ids_to_tokens(token)): token for token in special_ids}
    kept = set()
    for name in keep:
        if name not in named:
            raise InputError(
                f"activations.keep_special: the tokenizer has no special token {name!r}; it has "
                f"{', '.join(map(repr, named)) or 'none'}."
            )
        kept.add(named[name])
    return [token for token in special_ids if token not in kept]


def norm_limit(norms: np.ndarray, multiple: float | None) -> float | None:
    """The largest norm that a row of a part may have: `multiple` times the median of the part.

    Where more than half of the rows are zero there is no usual norm, and no limit.

    Args:
        norms: of the part's rows. [rows]
    """
    if multiple is None:
        return None
    median = float(np.median(norms))
    return multiple * median if median > 0 else None


def fill_gaps(n_rows: int, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How rows are moved so that those that stay come first: the last of them take the places of the dropped ones.

    Rows in random order stay in random order: which ones move depends on places alone.

    Args:
        dropped: places of the rows that go, ascending. [dropped]

    Returns: places to fill, and the places of the rows that go there; as many of either.
    """
    n_kept = n_rows - len(dropped)
    tail = np.arange(n_kept, n_rows)
    return dropped[dropped < n_kept], tail[~np.isin(tail, dropped, assume_unique=True)]
