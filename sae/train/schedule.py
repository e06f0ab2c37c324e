"""How many steps a run has, learning rate and lambda of each: pure functions, so a resumed run needs no state."""


def count_steps(n_tokens: int, rows_per_epoch: int, batch_rows: int) -> int:
    """Steps that consume at least `n_tokens` rows, when the last batch of every epoch may be short."""
    epochs, rest = divmod(n_tokens, rows_per_epoch)
    return epochs * -(-rows_per_epoch // batch_rows) + -(-rest // batch_rows)


def batch_of(step: int, rows_per_epoch: int, batch_rows: int) -> tuple[int, int]:
    """Epoch and batch in it, from 0, that step 0 <= step is trained on."""
    return divmod(step, -(-rows_per_epoch // batch_rows))


def learning_rate(step: int, n_steps: int, peak: float, warmup_fraction: float, decay_fraction: float) -> float:
    """The learning rate of step 0 <= step < n_steps: a linear rise, the peak, a linear fall to zero.

    The rise ends at the peak in the last of its steps; the fall would reach zero one step after the end, so that no
    step is wasted. Where the two overlap, the smaller counts.
    """
    warmup_steps = round(warmup_fraction * n_steps)
    decay_steps = round(decay_fraction * n_steps)
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (n_steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(rise, fall, 1.0)


LATE_WAKING = 10
"""Times the peak of the learning rate, by which dead latents are woken while it falls."""


def waking_rate(step: int, n_steps: int, peak: float, warmup_fraction: float, decay_fraction: float) -> float:
    """What `wake_rate` counts in, at step 0 <= step < n_steps: the learning rate, and ten times its peak once it falls.

    By then weights hardly move. A latent that wakes disturbs little, and one that does not is dead for good.
    """
    if n_steps - step < round(decay_fraction * n_steps):
        return LATE_WAKING * peak
    return learning_rate(step, n_steps, peak, warmup_fraction, decay_fraction)


def warmed_up(step: int, n_steps: int, value: float, warmup_fraction: float) -> float:
    """A coefficient that rises linearly from the first step on and stays at `value` from the end of the warm-up."""
    warmup_steps = round(warmup_fraction * n_steps)
    return value * min(1.0, (step + 1) / warmup_steps) if warmup_steps else value
