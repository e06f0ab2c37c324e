"""The k largest of values that are spread over devices: what one device finds for others, and what it keeps itself.

Ties for the last place go to the first devices, so exactly as many are kept as on one device.
"""

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

DIGIT_BITS = 11
"""Of a radix select. Counts of 16 bits at a time would be half a megabyte: more than what else a small step tells."""
_AS_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def cut_rows(candidates: Tensor, k: int) -> Tensor:
    """For every device, from which value on it keeps what it has of a row, and how many that equal it.

    Args:
        candidates: at least the k largest that every device has of a row, filled up with -inf. [devices, rows, k]

    Returns: both numbers as they travel, for `keep_in_rows`. uint8 [devices, rows, bytes]
    """
    merged = candidates.transpose(0, 1).flatten(1)
    threshold = merged.topk(k, dim=1, sorted=False).values.amin(dim=1)
    n_above = (candidates > threshold.unsqueeze(1)).sum(dim=(0, 2))
    places = places_left((candidates == threshold.unsqueeze(1)).sum(dim=2), k - n_above).to(torch.int32)
    columns = (threshold.expand(places.shape), places)
    return torch.cat([column.contiguous().unsqueeze(-1).view(torch.uint8) for column in columns], dim=-1)


def keep_in_rows(values: Tensor, cuts: Tensor) -> Tensor:
    """What a device keeps of each row, by the `cut_rows` of all. bool [rows, columns]

    A row with a value that is not a number is kept whole: its loss tells of it.

    Args:
        values: [rows, columns]
        cuts: of this device. [rows, bytes]
    """
    n_bytes = values.element_size()
    # Not contiguous(): it leaves the slice of a single row as it is, which cannot be seen as wider numbers.
    threshold = cuts[:, :n_bytes].clone(memory_format=torch.contiguous_format).view(values.dtype)
    places = cuts[:, n_bytes:].clone(memory_format=torch.contiguous_format).view(torch.int32)
    above, tied = (values <= threshold).logical_not_(), values == threshold
    return above.logical_or_(tied.logical_and_(tied.cumsum(dim=1) <= places))


def places_left(n_tied: Tensor, n_places: Tensor | int) -> Tensor:
    """How many of its ties each device keeps when there are so many places for all. [devices, ...] -> [devices, ...]"""
    before = n_tied.cumsum(dim=0) - n_tied
    return (n_places - before).clamp_min(0).minimum(n_tied)


def n_th_largest(values: Tensor, n: int, summed: Callable[[Tensor], Tensor]) -> tuple[Tensor, int] | None:
    """The n-th largest of the positive values of all devices, exact, by a radix select on their bit patterns.

    Positive floats are ordered as the integers of the same bits; values are counted by their leading bits, the counts
    are summed over devices, and the search goes on below the digit in which the n-th lies.

    Args:
        values: this device's, all positive. [values]
        summed: counts, summed over all devices.

    Returns: the value, and how many that equal it belong to the n largest; None when there are fewer than n.
    """
    bits, n_bits = values.view(_AS_INTEGERS[values.dtype]), 8 * values.element_size() - 1
    prefix, left = 0, n
    for top in range(n_bits, 0, -DIGIT_BITS):
        low = max(top - DIGIT_BITS, 0)
        if top < n_bits:
            bits = bits[bits >> top == prefix]
        digits = (bits >> low) & ((1 << (top - low)) - 1)
        # As a list: a GPU is waited for once, not at every look.
        from_top = summed(torch.bincount(digits, minlength=1 << (top - low))).flip(0).cumsum(0).tolist()
        if top == n_bits and from_top[-1] < n:
            return None
        place = bisect.bisect_left(from_top, left)
        left -= from_top[place - 1] if place else 0
        prefix = (prefix << (top - low)) | (len(from_top) - 1 - place)
    threshold = torch.tensor(prefix, dtype=bits.dtype, device=values.device).view(values.dtype)
    return threshold, left
