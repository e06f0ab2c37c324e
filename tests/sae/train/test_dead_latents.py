import torch

from sae.train.dead_latents import DeadLatentClock, wake


def test_a_latent_dies_after_the_tokens_of_the_window_whatever_the_batch_size() -> None:
    for rows in (10, 25, 100):
        clock = DeadLatentClock(3, dead_after_tokens=100)
        fired = torch.tensor([True, False, False])
        for seen in range(rows, 101, rows):
            assert clock.dead_or_none() is None
            clock.update(fired, rows)
            assert clock.tokens_since_fired.tolist() == [0, seen, seen]
        assert clock.dead.tolist() == [False, True, True]


def test_a_dead_latent_that_fires_is_alive_again() -> None:
    clock = DeadLatentClock(2, dead_after_tokens=5)
    clock.update(torch.tensor([False, False]), 5)
    clock.update(torch.tensor([True, False]), 1)
    assert clock.dead.tolist() == [False, True]
    assert clock.tokens_since_fired.tolist() == [0, 6]
    assert clock.silent_for(7).tolist() == [False, False]


def test_only_latents_that_were_silent_for_long_enough_are_woken() -> None:
    clock = DeadLatentClock(3, dead_after_tokens=5)
    clock.tokens_since_fired.copy_(torch.tensor([0, 19, 20]))
    b_enc = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0]))
    wake(b_enc, clock, n_tokens=20, rise=0.25)
    assert b_enc.tolist() == [1.0, 1.0, -0.75]
