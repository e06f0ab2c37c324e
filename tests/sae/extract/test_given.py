import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from sae.errors import ConfigError, InputError
from sae.extract.config import ArraySource, GivenPartsSpec, GivenSource, InlineSource, SuperpositionSource
from sae.extract.given import import_activations, resolve_given_content
from sae.store.artefacts.records import local_files, read_record
from sae.store.part.writer import PartLayout
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage


def make_spec(source: GivenSource, **options) -> GivenPartsSpec:
    defaults = {
        "source": source,
        "content": resolve_given_content(source),
        "split": "train",
        "heldout_fraction": 0.0,
        "dtype": "float32",
        "part_bytes": 7 * 4 * 4,
        "row_group_bytes": 3 * 4 * 4,
        "seed": 0,
    }
    return GivenPartsSpec.model_validate(defaults | options)


def stored(storage: Storage, spec: GivenPartsSpec) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and vectors in stored order."""
    import_activations(storage, spec)
    snapshot_spec = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot_spec)
    blocks = [
        (block.seq.copy(), block.act.copy()) for block in iter_rows(storage, read_snapshot(storage, snapshot_spec.ref))
    ]
    return np.concatenate([seq for seq, _ in blocks]), np.concatenate([act for _, act in blocks])


def values(n_rows: int = 20) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_rows, 4)).astype(np.float32)


def save(array: np.ndarray, path) -> ArraySource:
    suffix = path.suffix
    if suffix == ".npy":
        np.save(path, array)
    elif suffix == ".safetensors":
        safetensors.torch.save_file({"act": torch.from_numpy(array)}, path)
    else:
        flat = pa.array(array.ravel())
        if path.stem == "fixed":
            column = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        else:
            column = pa.array(array.tolist(), pa.list_(pa.float32()))
        pq.write_table(pa.table({"act": column}), path)
    return ArraySource(url=str(path))


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.parquet", "fixed.parquet"])
def test_file_is_stored_row_by_row(storage, tmp_path, name):
    array = values()
    seq, act = stored(storage, make_spec(save(array, tmp_path / name)))
    assert sorted(seq) == list(range(20))
    assert np.array_equal(act, array[seq])
    assert set(seq[:7]) == set(range(7))
    assert seq[:7].tolist() != list(range(7))


def test_inline_rows_are_stored_and_parts_are_described(storage):
    array = values(8).astype(float)
    spec = make_spec(InlineSource(values=tuple(map(tuple, array.tolist())), labels=tuple("abcdefgh")))
    seq, act = stored(storage, spec)
    assert np.array_equal(act, array[seq].astype(np.float32))
    plan = read_record(storage, spec.ref)
    assert plan.metrics == {
        "d_in": 4,
        "n_parts": 2,
        "n_contexts": 8,
        "contexts_per_part": 7,
        "tokens_per_part": 7,
        "row_group_rows": 3,
    }
    assert spec.content == ""


def test_bfloat16_and_integers_are_read(storage, tmp_path):
    array = torch.arange(40).reshape(10, 4)
    safetensors.torch.save_file({"act": array.to(torch.bfloat16)}, tmp_path / "x.safetensors")
    seq, act = stored(storage, make_spec(ArraySource(url=str(tmp_path / "x.safetensors"))))
    assert np.array_equal(act, array.numpy()[seq])
    np.save(tmp_path / "x.npy", array.numpy())
    seq, act = stored(storage, make_spec(ArraySource(url=str(tmp_path / "x.npy")), dtype="float16"))
    assert act.dtype == np.float16
    assert np.array_equal(act, array.numpy()[seq])


def test_held_out_rows_are_the_last_and_keep_their_numbers(storage, tmp_path):
    array = values()
    source = save(array, tmp_path / "x.npy")
    seq_train, _ = stored(storage, make_spec(source, heldout_fraction=0.25))
    seq, act = stored(storage, make_spec(source, heldout_fraction=0.25, split="heldout"))
    assert sorted(seq) == list(range(15, 20))
    assert sorted(seq_train) == list(range(15))
    assert np.array_equal(act, array[seq])
    with pytest.raises(InputError, match="leave none for the heldout split"):
        import_activations(storage, make_spec(source, split="heldout"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_is_named(storage, tmp_path, bad):
    array = values()
    array[13, 2] = bad
    with pytest.raises(InputError, match="row 13 holds NaN or infinite values"):
        import_activations(storage, make_spec(save(array, tmp_path / "x.npy")))


def test_constant_data_is_refused(storage, tmp_path):
    with pytest.raises(InputError, match="constant data"):
        import_activations(storage, make_spec(save(np.ones((9, 4), np.float32), tmp_path / "x.npy")))


def test_a_file_of_float16_is_stored_as_it_is(storage, tmp_path):
    array = values().astype(np.float16)
    seq, act = stored(storage, make_spec(save(array, tmp_path / "x.npy"), dtype="float16"))
    assert act[np.argsort(seq)].tobytes() == array.tobytes()


def test_large_values_are_stored_as_float16_with_an_exponent_and_too_large_ones_refused(storage, tmp_path):
    array = values()
    array[4, 0] = 1e6
    spec = make_spec(save(array, tmp_path / "x.npy"), dtype="float16")
    import_activations(storage, spec)
    layouts = [PartLayout.model_validate(read_record(storage, spec.ref, part).metrics["layout"]) for part in range(2)]
    assert [layout.encoding.exponent for layout in layouts] == [5, 0]
    array[4, 0] = 1e10
    with pytest.raises(ConfigError, match=r"row 4 holds 1e\+10, float16 goes up to 1\.07322e\+09"):
        import_activations(storage, make_spec(save(array, tmp_path / "x.npy"), dtype="float16"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("int8", 0.02)])
def test_narrow_dtypes_hold_the_values_within_their_precision(storage, tmp_path, dtype, tolerance):
    array = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    import_activations(storage, spec := make_spec(save(array, tmp_path / "x.npy"), dtype=dtype))
    commit_snapshot(storage, snapshot := SnapshotSpec(parts=(spec.ref,), n_tokens=None))
    for block in iter_rows(storage, read_snapshot(storage, snapshot.ref)):
        np.testing.assert_allclose(block.act, array[block.seq], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(9,), (3, 3, 3), (0, 4)])
def test_array_of_another_shape_is_refused(storage, tmp_path, shape):
    np.save(tmp_path / "x.npy", np.ones(shape, np.float32))
    with pytest.raises(InputError, match=r"expected \[rows, d_in\]"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / "x.npy"))))


def test_pickled_array_is_never_loaded(storage, tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:  # a header that announces pickled objects
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        file.write(b"never reached")
    with pytest.raises(InputError, match=r"not a plain \.npy array"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / "x.npy"))))


def test_missing_names_are_listed(storage, tmp_path):
    for name in ("x.safetensors", "x.parquet"):
        source = save(values(), tmp_path / name)
        source = ArraySource(url=source.url, name="acts")
        with pytest.raises(InputError, match="'acts'; it has 'act'"):
            import_activations(storage, make_spec(source))


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.parquet"])
def test_damaged_file_is_named(storage, tmp_path, name):
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(InputError, match="not a"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / name))))


def test_parquet_that_holds_no_vectors_is_refused(storage, tmp_path):
    pq.write_table(pa.table({"act": [1.0, 2.0]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="expected lists of numbers"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / "x.parquet"))))
    pq.write_table(pa.table({"act": [[1.0], [2.0, 3.0]]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="lengths from 1 to 2"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / "y.parquet"))))


def test_missing_file_and_unknown_format_are_refused(storage, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        resolve_given_content(ArraySource(url=str(tmp_path / "x.npy")))
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(InputError, match=r"a \.csv file; expected one of \.npy, \.safetensors, \.parquet"):
        import_activations(storage, make_spec(ArraySource(url=str(tmp_path / "x.csv"))))


def test_file_that_changed_after_planning_is_refused(storage, tmp_path):
    spec = make_spec(save(values(), tmp_path / "x.npy"))
    save(values() + 1, tmp_path / "x.npy")
    with pytest.raises(InputError, match="changed while the pipeline ran"):
        import_activations(storage, spec)


def test_inline_rows_of_different_length_are_refused():
    with pytest.raises(ValidationError, match="different lengths"):
        InlineSource(values=((1.0, 2.0), (1.0,)))


def test_identity_of_a_file_is_its_content(tmp_path):
    first = resolve_given_content(save(values(), tmp_path / "x.npy"))
    assert first == resolve_given_content(save(values(), tmp_path / "y.npy"))
    assert first != resolve_given_content(save(values() + 1, tmp_path / "x.npy"))


def test_superposition_brings_its_true_directions(storage, monkeypatch):
    monkeypatch.setattr("sae.extract.superposition.N_STEPS", 50)
    source = SuperpositionSource(n_features=6, d_in=3, n_samples=30, probability=0.3)
    spec = make_spec(source)
    _, act = stored(storage, spec)
    assert act.shape == (30, 3)
    with local_files(storage, read_record(storage, spec.ref)) as folder:
        directions = safetensors.torch.load_file(folder / "directions.safetensors")["directions"].numpy()
    assert directions.shape == (6, 3)
    # Every sample is a sum of the directions with sizes from 0 to 1.
    assert (np.linalg.norm(act, axis=1) <= np.linalg.norm(directions, axis=1).sum() + 1e-6).all()
    assert import_activations(storage, spec) == read_record(storage, spec.ref)
