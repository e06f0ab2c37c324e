import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae.errors import InputError, StopRequested, TrainingError
from sae.extract.config import TokensSpec
from sae.philox import philox
from sae.store import layout
from sae.store.artefacts.records import commit, local_files, read_record
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts, write_contexts
from sae.subject.baselines import ngram_losses
from sae.subject.config import EmbeddedLM, EmbeddedLMSpec, TokenizerSpec
from sae.subject.embedded import batch_indices, lr_factor, mean_loss, new_model, train_embedded_lm, train_tokenizer
from sae.subject.load import load_subject

SEGMENT = "segments/0123456789abcdef"
TEXTS = [f"def function_{i}(self, value):\n    return value + {i}\n" for i in range(40)]
TINY = {"vocab_size": 300, "d_model": 16, "n_heads": 2, "d_mlp": 32, "batch_contexts": 8}
CONTEXT = 16


def make_tokenizer(storage: Storage) -> TokenizerSpec:
    spec = TokenizerSpec(vocab_size=300, segments=(SEGMENT,))
    train_tokenizer(storage, spec, TEXTS)
    return spec


def as_contexts(tokens: np.ndarray, first: int = 0) -> Contexts:
    seq = np.arange(first, first + len(tokens), dtype=np.int32)
    return Contexts(seq=seq, tokens=tokens.astype(np.int32), docs=np.zeros_like(tokens, np.int32), labels=None)


def cyclic_contexts(n: int, first: int = 0) -> Contexts:
    """Every token is the one before it plus one, modulo 50: a bigram model learns that, a unigram model cannot."""
    starts = np.random.default_rng(first).integers(0, 50, n)
    return as_contexts((starts[:, None] + np.arange(CONTEXT)) % 50, first)


def make_tokens(storage: Storage, tokenizer: TokenizerSpec, n_heldout: int = 20) -> TokensSpec:
    spec = TokensSpec(
        segment=SEGMENT, tokenizer=tokenizer.ref, context_tokens=CONTEXT, packing=True, syntax=False, seed=0
    )
    with storage.staging() as folder:
        write_contexts(folder / "train.parquet", cyclic_contexts(100))
        write_contexts(folder / "heldout.parquet", cyclic_contexts(n_heldout, first=100))
        commit(storage, spec, folder, {"vocab_size": 300}, seconds=0.0)
    return spec


def make_spec(storage: Storage, n_steps: int, **options) -> EmbeddedLMSpec:
    tokenizer = make_tokenizer(storage)
    config = EmbeddedLM(**TINY | {"n_steps": n_steps, "warmup_steps": 5, "lr": 1e-2} | options)
    return EmbeddedLMSpec(config=config, tokenizer=tokenizer.ref, tokens=make_tokens(storage, tokenizer).ref, seed=0)


def test_tokenizer_loads_with_auto_tokenizer_and_is_lossless(storage):
    spec = make_tokenizer(storage)
    with local_files(storage, read_record(storage, spec.ref)) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXTS[0] + "naïve — 漢字 🙂\n\t end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert len(tokenizer) == 300


def test_tokenizer_of_the_same_text_has_the_same_bytes(tmp_path):
    contents = []
    for name in "ab":
        storage = Storage(str(tmp_path / name))
        contents.append(read_record(storage, make_tokenizer(storage).ref).content)
    assert contents[0] == contents[1]


def test_vocabulary_that_the_text_cannot_fill_is_refused(storage):
    with pytest.raises(InputError, match="has text for a vocabulary of"):
        train_tokenizer(storage, TokenizerSpec(vocab_size=5000, segments=(SEGMENT,)), TEXTS)


def test_trained_model_learns_what_the_bigram_baseline_knows(storage):
    record = train_embedded_lm(storage, make_spec(storage, n_steps=150))
    metrics = record.metrics
    assert metrics["heldout_loss"] < 0.2 < 3.5 < metrics["unigram_loss"]
    assert metrics["n_tokens"] == 150 * 8 * CONTEXT
    subject = load_subject(storage, record.ref)
    assert subject.causal
    assert subject.special_ids == (0,)
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert subject.model(tokens).logits[0, -1].argmax() == 7
    with local_files(storage, record) as folder:
        assert len(AutoTokenizer.from_pretrained(folder)) == 300
        again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(tokens).logits, subject.model(tokens).logits)


def test_zero_steps_give_the_untrained_model(storage):
    spec = make_spec(storage, n_steps=0)
    record = train_embedded_lm(storage, spec)
    untrained = new_model(spec.config, 300, CONTEXT, spec.seed).state_dict()
    loaded = load_subject(storage, record.ref).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in untrained.items())
    assert record.metrics["heldout_loss"] == pytest.approx(np.log(300), rel=0.05)


def test_same_spec_gives_the_same_bytes_and_another_seed_others(tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        storage = Storage(str(tmp_path / name))
        torch.rand(len(contents))  # the global generator must not matter
        spec = EmbeddedLMSpec.model_validate(make_spec(storage, n_steps=12).model_dump() | {"seed": seed})
        contents.append(train_embedded_lm(storage, spec).content)
    assert contents[0] == contents[1] != contents[2]


def test_training_leaves_the_global_generator_alone(storage):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train_embedded_lm(storage, make_spec(storage, n_steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_loss_that_is_not_finite_ends_training(storage):
    with pytest.raises(TrainingError, match=r"Lower subject\.lr"):
        train_embedded_lm(storage, make_spec(storage, n_steps=50, lr=1e30))


class Interrupted(Exception):
    """Ends training as a kill would: nothing is saved."""


def end_at(step: int, error: type[Exception]) -> Callable[..., None]:
    def progress(done: int, *_: object) -> None:
        if done == step:
            raise error("asked to stop")

    return progress


def checkpoint_files(storage: Storage, spec: EmbeddedLMSpec) -> list[list[str]]:
    folder = layout.checkpoint_folder(spec.ref)
    return [storage.list(f"{folder}/{attempt}") for attempt in storage.list(folder)]


@pytest.mark.parametrize("memory", [False, True])
def test_interrupted_training_ends_with_the_bytes_of_an_uninterrupted_one(memory, storage, memory_storage):
    expected = train_embedded_lm(storage, make_spec(storage, n_steps=40), checkpoint_every_steps=0)
    broken = memory_storage if memory else Storage(f"{storage.root}-broken")
    spec = make_spec(broken, n_steps=40)
    for error, step, resumed in (
        (Interrupted, 9, 1),
        (StopRequested, 13, 6),  # an epoch has 12.5 batches
        (Interrupted, 24, 14),
        (StopRequested, 26, 21),
        (StopRequested, 39, 27),
        (Interrupted, 40, 40),
    ):
        done: list[int] = []
        end = end_at(step, error)

        def progress(at: int, *_: object, done: list[int] = done, end: Callable[..., None] = end) -> None:
            done.append(at)
            end(at)

        with pytest.raises(error):
            train_embedded_lm(broken, spec, checkpoint_every_steps=5, progress=progress)
        assert done == list(range(resumed, step + 1))
    record = train_embedded_lm(broken, spec, checkpoint_every_steps=5)
    assert (record.ref, record.content, record.metrics) == (expected.ref, expected.content, expected.metrics)
    assert not any(checkpoint_files(broken, spec))


def test_a_stop_says_the_step_and_what_was_kept(storage):
    spec = make_spec(storage, n_steps=40)
    with pytest.raises(StopRequested, match="stopped at step 7 of 40, without a checkpoint"):
        train_embedded_lm(storage, spec, checkpoint_every_steps=0, progress=end_at(7, StopRequested))
    assert checkpoint_files(storage, spec) == []
    with pytest.raises(StopRequested, match=r"asked to stop: .* stopped at step 7 of 40, the same call goes on"):
        train_embedded_lm(storage, spec, progress=end_at(7, StopRequested))
    assert checkpoint_files(storage, spec) == [["step-00000007.json", "step-00000007.safetensors"]]


def test_a_stop_at_the_last_step_leaves_only_the_commit_to_do(storage):
    spec = make_spec(storage, n_steps=6)
    with pytest.raises(StopRequested):
        train_embedded_lm(storage, spec, progress=end_at(6, StopRequested))
    done: list[int] = []
    record = train_embedded_lm(storage, spec, progress=lambda at, *_: done.append(at))
    assert done == []
    again = Storage(f"{storage.root}-again")
    assert record.content == train_embedded_lm(again, make_spec(again, n_steps=6)).content


def test_a_damaged_checkpoint_of_the_subject_is_passed_over(storage, caplog):
    spec = make_spec(storage, n_steps=20)
    with pytest.raises(Interrupted):
        train_embedded_lm(storage, spec, checkpoint_every_steps=4, progress=end_at(13, Interrupted))
    (attempt,) = storage.list(layout.checkpoint_folder(spec.ref))
    path = layout.checkpoint_data(spec.ref, attempt, 12)
    storage.replace(path, storage.read_bytes(path)[:-1])
    done: list[int] = []
    record = train_embedded_lm(storage, spec, checkpoint_every_steps=4, progress=lambda at, *_: done.append(at))
    assert done[0] == 9
    assert "step-00000012.json is passed over" in caplog.text
    again = Storage(f"{storage.root}-again")
    assert record.content == train_embedded_lm(again, make_spec(again, n_steps=20)).content


def test_padding_is_neither_input_nor_target_of_the_loss():
    model = new_model(EmbeddedLM(**TINY), 300, CONTEXT, seed=0)
    full = cyclic_contexts(3)
    padded = Contexts(full.seq, full.tokens.copy(), full.docs.copy(), None)
    padded.docs[:, 10:] = -1
    padded.tokens[:, 10:] = 299
    short = Contexts(full.seq, full.tokens[:, :10], full.docs[:, :10], None)
    assert mean_loss(model, padded) == pytest.approx(mean_loss(model, short), rel=1e-6)


def test_every_epoch_has_every_context_once():
    batches = batch_indices(10, 4, seed=0)
    drawn = np.concatenate([next(batches) for _ in range(10)]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in drawn)
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("n_contexts", "batch_contexts"), [(10, 4), (7, 7), (3, 8), (1, 1)])
def test_batches_can_begin_anywhere_and_are_drawn_in_one_order(n_contexts, batch_contexts):
    order = itertools.chain.from_iterable(
        philox("subject", 5, epoch).permutation(n_contexts) for epoch in itertools.count()
    )
    expected = [list(itertools.islice(order, batch_contexts)) for _ in range(12)]
    for start in range(10):
        batches = batch_indices(n_contexts, batch_contexts, seed=5, start=start)
        assert [next(batches).tolist() for _ in range(start, 12)] == expected[start:]


def test_a_batch_far_away_is_found_without_walking_there():
    # A billion contexts lie before it: walking would take hours.
    batch = next(batch_indices(8, 4, seed=0, start=250_000_000))
    assert batch.tolist() == philox("subject", 0, 125_000_000).permutation(8)[:4].tolist()


def test_learning_rate_rises_stays_and_falls_to_zero():
    config = EmbeddedLM(n_steps=100, warmup_steps=10, decay_from=0.4)
    factors = [lr_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert set(factors[10:41]) == {1.0}
    assert factors[70] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 60)


def test_heads_that_do_not_fit_are_refused_by_the_config():
    with pytest.raises(ValidationError, match="not a multiple of 8"):
        EmbeddedLM(d_model=128, n_heads=5)


def test_ngram_losses_equal_counting_by_hand():
    generator = np.random.default_rng(0)
    train = as_contexts(generator.integers(0, 5, (30, 8)))
    heldout = as_contexts(generator.integers(0, 7, (5, 8)))
    losses = ngram_losses(train, heldout, 7)
    mass = float(losses.rule.split("prior mass ")[1].split()[0])
    unigram, bigram = np.ones(7), np.zeros((7, 7))
    for row in train.tokens:
        for a, b in itertools.pairwise(row):
            unigram[b] += 1
            bigram[a, b] += 1
    unigram /= unigram.sum()
    pairs = [(a, b) for row in heldout.tokens for a, b in itertools.pairwise(row)]
    expected = [-np.log((bigram[a, b] + mass * unigram[b]) / (bigram[a].sum() + mass)) for a, b in pairs]
    assert losses.unigram == pytest.approx(np.mean([-np.log(unigram[b]) for _, b in pairs]))
    assert losses.bigram == pytest.approx(np.mean(expected))


def test_without_held_out_text_there_are_no_losses(storage):
    tokenizer = make_tokenizer(storage)
    tokens = make_tokens(storage, tokenizer, n_heldout=0)
    config = EmbeddedLM(**TINY | {"n_steps": 1})
    spec = EmbeddedLMSpec(config=config, tokenizer=tokenizer.ref, tokens=tokens.ref, seed=0)
    metrics = train_embedded_lm(storage, spec).metrics
    assert metrics["heldout_loss"] is metrics["bigram_loss"] is metrics["unigram_loss"] is None
