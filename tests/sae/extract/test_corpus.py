import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import ConfigError, InputError
from sae.extract import corpus
from sae.extract.config import DatasetSource, FilesSource, StdlibSource
from sae.extract.corpus import (
    Document,
    commit_segment,
    is_heldout,
    iter_documents,
    resolve_segment,
    training_texts,
)


def text(*urls) -> FilesSource:
    return FilesSource(kind="text", urls=tuple(map(str, urls)))


def jsonl(*urls, **options) -> FilesSource:
    return FilesSource(kind="jsonl", urls=tuple(map(str, urls)), **options)


def parquet(*urls, **options) -> FilesSource:
    return FilesSource(kind="parquet", urls=tuple(map(str, urls)), **options)


def use_stdlib(monkeypatch, folder) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})


def test_standard_library_is_read_in_order_without_the_excluded(monkeypatch, tmp_path):
    for name in ("b.py", "a.py", "json/x.py", "test/t.py", "config-3.11/c.py", "_sysconfigdata_x.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    use_stdlib(monkeypatch, tmp_path)
    assert [document.name for document in iter_documents(StdlibSource())] == ["a.py", "b.py", "json/x.py"]
    assert [document.name for document in iter_documents(StdlibSource(max_documents=1))] == ["a.py"]


def test_real_standard_library_is_a_corpus(storage):
    source = StdlibSource(max_documents=5)
    record = commit_segment(storage, resolve_segment(source, 0.05), source)
    assert record.metrics["n_documents"] + record.metrics["n_skipped"] == 5
    assert record.metrics["n_bytes"] > 5_000


def test_missing_standard_library_names_the_corpus_option(monkeypatch, tmp_path):
    use_stdlib(monkeypatch, tmp_path / "python311.zip")
    with pytest.raises(InputError, match=r"corpus\.segments"):
        list(iter_documents(StdlibSource()))


def test_small_standard_library_is_warned_about(monkeypatch, tmp_path, storage, caplog):
    (tmp_path / "a.py").write_text("x = 1\n")
    use_stdlib(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        commit_segment(storage, resolve_segment(StdlibSource(), 0.05), StdlibSource())
    assert "standard library" in caplog.text


def test_files_that_are_not_utf8_and_empty_ones_are_skipped_and_counted(tmp_path, storage):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text(" \n")
    source = text(tmp_path / "*.txt")
    record = commit_segment(storage, resolve_segment(source, 0.0), source)
    assert record.metrics["n_documents"] == 1
    assert record.metrics["n_skipped"] == 2
    content = json.loads(storage.read_bytes(record.path("segment.json")))
    assert content["skipped"] == ["b.txt: not UTF-8 (byte 3 is 0xe9)", "c.txt: empty"]


def test_corpus_without_any_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"b\.txt: not UTF-8 \(byte 3"):
        list(iter_documents(text(tmp_path / "b.txt")))


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "no such file"), ("*.md", "no file matches"), ("", "is a folder")],
)
def test_files_that_are_not_there_are_named(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        list(iter_documents(text(tmp_path / name if name else tmp_path)))


def test_unknown_protocol_is_an_error_of_the_corpus():
    with pytest.raises((InputError, ConfigError), match="nosuch"):
        list(iter_documents(text("nosuch://bucket/file.txt")))


def test_corpus_of_empty_documents_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match="no document to read; 1 were skipped"):
        list(iter_documents(text(tmp_path / "a.txt")))


def test_file_matched_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert len(list(iter_documents(text(tmp_path / "*.txt", tmp_path / "a.txt")))) == 1


def test_lines_of_jsonl_are_documents_plain_or_compressed(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}", "id": i}) + "\n" for i in range(3)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    documents = list(iter_documents(jsonl(tmp_path / "*.jsonl*")))
    assert documents[0] == Document("a.jsonl:1", "line 0")
    assert [document.text for document in documents] == ["line 0", "line 1", "line 2"] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', r"line 2: no key 'text'; its keys are 'body', 'id'"),
        ('{"text": 3}', "line 2: the text is a int"),
        ('["x"]', "line 2: a list, expected an object"),
        ("not json", "line 2: not JSON"),
    ],
)
def test_bad_line_of_jsonl_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        list(iter_documents(jsonl(tmp_path / "a.jsonl")))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (document,) = iter_documents(jsonl(tmp_path / "a.jsonl"))
    assert document.text == "a\ufffdb"


def test_rows_of_parquet_are_documents_and_nulls_are_skipped(tmp_path, storage):
    pq.write_table(pa.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    source = parquet(tmp_path / "a.parquet")
    assert [document.name for document in iter_documents(source)] == ["a.parquet:0", "a.parquet:2"]
    assert commit_segment(storage, resolve_segment(source, 0.0), source).metrics["n_skipped"] == 1
    with pytest.raises(InputError, match="no column 'body'; its columns are 'text', 'n'"):
        list(iter_documents(parquet(tmp_path / "a.parquet", text_field="body")))
    with pytest.raises(InputError, match="the text is a int"):
        list(iter_documents(parquet(tmp_path / "a.parquet", text_field="n")))


def test_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match="not a Parquet file"):
        list(iter_documents(parquet(tmp_path / "a.parquet")))


@pytest.mark.filterwarnings("ignore")
def test_local_folder_is_streamed_as_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    lines = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5))
    (tmp_path / "train.jsonl").write_text(lines)
    source = DatasetSource(name=str(tmp_path), n_documents=3)
    assert list(iter_documents(source)) == [Document(str(i), f"row {i}") for i in range(3)]
    with pytest.raises(InputError, match="no column 'body'"):
        list(iter_documents(DatasetSource(name=str(tmp_path), n_documents=3, text_field="body")))
    with pytest.raises(InputError, match="nosplit"):
        list(iter_documents(DatasetSource(name=str(tmp_path), n_documents=3, split="nosplit")))


def test_missing_datasets_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'sae-pipeline\[datasets\]'"):
        list(iter_documents(DatasetSource(name=str(tmp_path), n_documents=3)))


def test_identity_is_the_content_and_not_the_place(tmp_path):
    for folder in ("one", "two/deeper"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("same")
    first, second = (resolve_segment(text(tmp_path / name / "*.txt"), 0.1) for name in ("one", "two/deeper"))
    assert first == second
    (tmp_path / "one" / "a.txt").write_text("other")
    assert resolve_segment(text(tmp_path / "one" / "*.txt"), 0.1) != first


def test_names_and_texts_cannot_be_exchanged_unnoticed(tmp_path):
    for folder, name, content in (("one", "a.txt", "bc"), ("two", "ab.txt", "c")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    assert resolve_segment(text(tmp_path / "one/*"), 0) != resolve_segment(text(tmp_path / "two/*"), 0)


def test_corpus_that_changed_since_it_was_planned_is_refused(tmp_path, storage):
    (tmp_path / "a.txt").write_text("before")
    source = text(tmp_path / "a.txt")
    spec = resolve_segment(source, 0.0)
    (tmp_path / "a.txt").write_text("after")
    with pytest.raises(InputError, match="changed while the pipeline ran"):
        commit_segment(storage, spec, source)


def test_training_texts_leave_out_the_held_out_documents(tmp_path, storage):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    source = text(tmp_path / "*.txt")
    spec = resolve_segment(source, 0.3)
    record = commit_segment(storage, spec, source)
    texts = set(training_texts(storage, spec.ref, source))
    heldout = {f"text {i}" for i in range(60) if is_heldout(f"{i}.txt", 0.3)}
    assert 0 < len(heldout) == record.metrics["n_heldout_documents"] < 60
    assert texts == {f"text {i}" for i in range(60)} - heldout


@given(name=st.text(max_size=20), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_larger_held_out_share_contains_the_smaller(name, fractions):
    small, large = sorted(fractions)
    assert not is_heldout(name, 0.0)
    assert is_heldout(name, large) or not is_heldout(name, small)


def test_held_out_share_is_near_its_fraction():
    share = sum(is_heldout(f"document {i}", 0.05) for i in range(10_000)) / 10_000
    assert abs(share - 0.05) < 0.01


def test_excluded_folders_do_not_reach_the_real_corpus():
    names = [document.name for document in iter_documents(StdlibSource())]
    assert names == sorted(names)
    assert not any(set(name.split("/")[:-1]) & corpus.STDLIB_EXCLUDED for name in names)


def test_a_large_corpus_is_measured_with_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "REPORT_BYTES", 1000)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " * 200)
    source = text(tmp_path / "*.txt")
    seen = []
    spec, tally = corpus.measure_segment(
        source, 0.4, lambda done, total, unit, note="": seen.append((done, unit, note))
    )
    assert spec == resolve_segment(source, 0.4)
    assert len(seen) > 3
    assert seen == sorted(seen)
    heldout = [path for path in tmp_path.glob("*.txt") if is_heldout(path.name, 0.4)]
    assert 0 < tally.n_heldout == len(heldout) < tally.n_documents == 20
    assert tally.n_heldout_bytes == sum(path.stat().st_size for path in heldout)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.txt.zip"])
def test_a_file_that_cannot_be_unpacked_is_named(tmp_path, name):
    (tmp_path / name).write_text("never packed")
    with pytest.raises(InputError, match=rf"{name}: cannot be unpacked .*Check corpus\.segments"):
        resolve_segment(text(tmp_path / name), 0.0)


def test_a_gzip_file_that_ends_early_is_named(tmp_path):
    packed = gzip.compress(b"words and more words " * 1000)
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"a\.txt\.gz: cannot be unpacked"):
        resolve_segment(text(tmp_path / "a.txt.gz"), 0.0)
