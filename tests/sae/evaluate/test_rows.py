"""Rows joined with their text."""

from dataclasses import replace

import numpy as np

from sae.evaluate.rows import concatenate_texts, count_tokens, part_contexts, row_texts
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import read_snapshot


def test_texts_are_those_of_the_contexts(make_world) -> None:
    world = make_world(n_segments=2)
    snapshot = read_snapshot(world.storage, world.snapshots["train"])
    pieces = []
    for part in range(len(snapshot.parts)):
        contexts = part_contexts(world.storage, snapshot, part)
        for block in iter_rows(world.storage, snapshot, [part]):
            texts = row_texts(contexts, part, block)
            pieces.append(texts)
            for i, (seq, pos) in enumerate(zip(block.seq, block.pos, strict=True)):
                row = int(seq - contexts.seq[0])
                assert texts.token[i] == contexts.tokens[row, pos]
                assert texts.previous[i] == contexts.tokens[row, pos - 1]
                assert texts.label[i] == contexts.labels[row, pos]
                assert texts.position[i] == pos
    whole = concatenate_texts(pieces, 10**6)
    assert len(whole) == snapshot.n_rows
    n_contexts = sum(len(contexts) for (_, split), contexts in world.contexts.items() if split == "train")
    assert len(np.unique(whole.context)) == n_contexts, "contexts of two segments share no number"
    cut = concatenate_texts(pieces, 7)
    np.testing.assert_array_equal(cut.token, whole.token[:7])
    assert concatenate_texts([pieces[0], replace(pieces[1], label=None)], 10**6).label is None
    np.testing.assert_array_equal(count_tokens(world.storage, snapshot), np.bincount(whole.token))
