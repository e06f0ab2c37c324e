import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.errors import InputError
from sae.extract import syntax
from sae.extract.config import FilesSource, TokensSpec
from sae.extract.corpus import Document, commit_segment, is_heldout, iter_documents, resolve_segment
from sae.extract.tokens import tokenize_documents, tokenize_segment
from sae.store.artefacts.records import local_files, require_record
from sae.store.text.contexts import PADDING, read_contexts, read_document_names
from sae.subject.load import load_tokenizer

SPLITS = ("train", "heldout")


def test_packed_contexts_are_the_documents_end_to_end(make_world):
    world = make_world(syntax=False)
    tokenizer = load_tokenizer(world.storage, world.tokenizer.ref)
    metrics = require_record(world.storage, world.tokens.ref).metrics
    documents = list(iter_documents(world.source))
    assert read_document_names(world.storage, world.tokens.ref) == [document.name for document in documents]
    n_dropped = 0
    for split in SPLITS:
        chosen = [i for i, document in enumerate(documents) if is_heldout(document.name, 0.2) == (split == "heldout")]
        stream = [(i, token) for i in chosen for token in [0, *tokenizer(documents[i].text)["input_ids"]]]
        expected = [stream[start : start + 16] for start in range(0, len(stream) - 15, 16)]
        contexts = read_contexts(world.storage, world.tokens.ref, split)
        found = [
            list(zip(docs.tolist(), tokens.tolist(), strict=True))
            for docs, tokens in zip(contexts.docs, contexts.tokens, strict=True)
        ]
        assert sorted(found) == sorted(expected)
        assert metrics[split] == {"n_contexts": len(expected), "n_tokens": 16 * len(expected)}
        n_dropped += len(stream) % 16
    assert metrics["n_dropped_tokens"] == n_dropped


def test_table_of_documents_says_where_each_went(make_world):
    world = make_world()
    with local_files(world.storage, require_record(world.storage, world.tokens.ref)) as folder:
        table = pq.read_table(folder / "documents.parquet").to_pydict()
    assert table["doc"] == list(range(40))
    assert table["split"] == ["heldout" if is_heldout(name, 0.2) else "train" for name in table["name"]]
    metrics = require_record(world.storage, world.tokens.ref).metrics
    kept = sum(metrics[split]["n_tokens"] for split in SPLITS)
    assert sum(table["n_tokens"]) == kept + metrics["n_dropped_tokens"]


def test_no_document_is_in_both_splits_and_numbers_run_on(make_world):
    world = make_world()
    train, heldout = (read_contexts(world.storage, world.tokens.ref, split) for split in SPLITS)
    assert not set(train.docs.ravel()) & set(heldout.docs.ravel())
    assert np.concatenate([train.seq, heldout.seq]).tolist() == list(range(len(train) + len(heldout)))


def test_contexts_are_permuted_by_the_seed_and_nothing_else(make_world):
    world = make_world()
    other = TokensSpec.model_validate(world.tokens.model_dump() | {"seed": 1})
    tokenize_segment(world.storage, other, world.source)
    first, second = (read_contexts(world.storage, spec.ref, "train").tokens for spec in (world.tokens, other))
    assert not np.array_equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not (np.diff(read_contexts(world.storage, world.tokens.ref, "train").docs[:, 0]) >= 0).all()


def test_tokenizing_again_gives_the_same_bytes(make_world):
    world = make_world()
    before = require_record(world.storage, world.tokens.ref)
    assert tokenize_segment(world.storage, world.tokens, world.source).content == before.content


def test_without_packing_each_context_is_the_start_of_one_document(make_world):
    world = make_world(packing=False)
    tokenizer = load_tokenizer(world.storage, world.tokenizer.ref)
    texts = [document.text for document in iter_documents(world.source)]
    metrics = require_record(world.storage, world.tokens.ref).metrics
    n_tokens = 0
    for split in SPLITS:
        contexts = read_contexts(world.storage, world.tokens.ref, split)
        for tokens, docs in zip(contexts.tokens, contexts.docs, strict=True):
            (doc,) = set(docs.tolist()) - {PADDING}
            expected = [0, *tokenizer(texts[doc])["input_ids"]][:16]
            assert tokens[docs != PADDING].tolist() == expected
            assert (tokens[docs == PADDING] == metrics["pad_id"]).all()
            n_tokens += len(expected)
    assert sum(metrics[split]["n_tokens"] for split in SPLITS) == n_tokens
    assert metrics["n_dropped_tokens"] == 0


def test_labels_follow_their_tokens_through_the_permutation(make_world):
    world = make_world()
    tokenizer = load_tokenizer(world.storage, world.tokenizer.ref)
    contexts = read_contexts(world.storage, world.tokens.ref, "train")
    names = require_record(world.storage, world.tokens.ref).metrics["label_names"]
    assert (contexts.labels[contexts.tokens == 0] == syntax.SPECIAL).all()
    keyword = names.index("keyword")
    for token, label in zip(contexts.tokens.ravel(), contexts.labels.ravel(), strict=True):
        text = tokenizer.decode([int(token)]).strip()
        if text in ("def", "return"):
            assert label == keyword
    assert (contexts.labels == keyword).any()


def test_text_that_spells_a_special_token_stays_text(make_world):
    world = make_world()
    tokenizer = load_tokenizer(world.storage, world.tokenizer.ref)
    documents = [Document("a", "x <|endoftext|> y")]
    (document,) = tokenize_documents(tokenizer, documents, 0, 0.0, with_labels=True)
    assert document.tokens[0] == 0
    assert 0 not in document.tokens[1:]
    assert tokenizer.decode(document.tokens[1:]) == "x <|endoftext|> y"
    assert len(document.labels) == len(document.tokens)


def test_document_without_tokens_is_still_an_integer_array(make_world):
    world = make_world()
    tokenizer = load_tokenizer(world.storage, world.tokenizer.ref)
    (document,) = tokenize_documents(tokenizer, [Document("a", "")], None, 0.0, with_labels=True)
    assert document.tokens.dtype == np.int32
    assert document.tokens.shape == document.labels.shape == (0,)


def test_corpus_smaller_than_a_context_is_refused(make_world):
    with pytest.raises(InputError, match="less than one context of 100000"):
        make_world(context_tokens=100_000)


def test_corpus_that_changed_since_its_segment_is_refused(make_world, corpus_folder):
    world = make_world()
    (corpus_folder / "file_00.py").write_text("y = 2\n")
    with pytest.raises(InputError, match="changed while the pipeline ran"):
        tokenize_segment(world.storage, world.tokens, world.source)


def test_jsonl_corpus_reaches_the_token_table(make_world, tmp_path):
    world = make_world()
    rows = [{"text": f"the value of row {i} is {i * i} and nothing else"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource(kind="jsonl", urls=(str(tmp_path / "rows.jsonl"),))
    segment = resolve_segment(source, 0.0)
    commit_segment(world.storage, segment, source)
    spec = TokensSpec.model_validate(world.tokens.model_dump() | {"segment": segment.ref, "syntax": False})
    metrics = tokenize_segment(world.storage, spec, source).metrics
    assert metrics["n_documents"] == 30
    assert metrics["heldout"] == {"n_contexts": 0, "n_tokens": 0}
    assert read_contexts(world.storage, spec.ref, "train").labels is None
