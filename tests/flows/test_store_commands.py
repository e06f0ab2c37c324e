"""`sae-pipeline store` on the root of a finished run, whole and harmed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from sae.plan import PipelineConfig, Plan, make_plan
from sae.store import layout
from sae.store.artefacts.records import require_record
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config
from tests.flows.processes import contents, strays
from tests.flows.test_repair import delete, flip_a_bit, truncate

pytestmark = pytest.mark.usefixtures("prefect_backend")


class Outcome:
    """What a command said and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def last(self) -> str:
        return self.out.splitlines()[-1]


Store = Callable[..., Outcome]


@pytest.fixture
def store(capsys: pytest.CaptureFixture[str]) -> Store:
    """Run `sae-pipeline store ...`."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main(["store", *map(str, arguments)])
        except SystemExit as err:  # argparse
            code = int(err.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def file(copy: PipelineConfig, tmp_path: Path) -> Path:
    """The config of `copy` as a file."""
    path = tmp_path / "config.json"
    path.write_text(copy.model_dump_json())
    return path


def root(config: PipelineConfig) -> tuple[str, str]:
    return "--root", config.execution.root


def harm(storage: Storage, plan: Plan) -> dict[str, Path]:
    """A flipped bit, a part cut short, a file that is gone, a damaged record. Returns: address -> what was harmed."""
    hook = plan.config.hook_points[0]
    parts = plan.parts[hook, "train"][0].ref
    harmed = {}
    for ref, part, name, damage in (
        (parts, 0, "part.parquet", flip_a_bit),
        (parts, 2, "part.parquet", truncate),
        (plan.saes[0].ref, None, "cfg.json", delete),
    ):
        record = require_record(storage, ref, part)
        path = Path(storage.full(record.path(name)))
        damage(path)
        harmed[ref if part is None else f"{ref}/part-{part:05d}"] = path
    path = Path(storage.full(layout.record_path(plan.evaluations[0].ref)))
    flip_a_bit(path)
    return harmed | {plan.evaluations[0].ref: path}


def test_info_lists_every_artefact(finished: PipelineConfig, store: Store) -> None:
    found = store("info", *root(finished))
    plan = make_plan(finished)
    assert found.code == 0
    assert all(spec.ref in found.out for spec in plan.specs())
    snapshot = plan.snapshots[finished.hook_points[0], "train"]
    (line,) = [line for line in found.out.splitlines() if line.startswith(snapshot.ref)]
    metrics = require_record(Storage(finished.execution.root), snapshot.ref).metrics
    assert f" {metrics['n_rows']:,} " in line
    assert f"{finished.hook_points[0]} train" in line
    assert "unfinished" not in found.out


def test_info_as_json_tells_what_refers_to_what(finished: PipelineConfig, store: Store) -> None:
    info = json.loads(store("info", "--json", *root(finished)).out)
    artefacts = {artefact["ref"]: artefact for artefact in info["artefacts"]}
    plan = make_plan(finished)
    assert {spec.ref for spec in plan.specs()} == set(artefacts)
    assert plan.saes[0].ref in artefacts[plan.saes[0].snapshot]["used_by"]
    assert sum(a["n_bytes"] for a in artefacts.values()) == sum(
        path.stat().st_size for path in Path(finished.execution.root).glob("[!.]*/**/*") if path.is_file()
    )


def test_info_of_one_artefact_has_its_lineage_both_ways(finished: PipelineConfig, store: Store) -> None:
    plan = make_plan(finished)
    found = store("info", plan.saes[0].ref, *root(finished))
    before, after = found.out.split("used by")
    assert plan.tokens[0].ref in before
    assert plan.report is not None
    assert plan.report.ref in after
    detail = json.loads(store("info", plan.saes[0].ref, "--json", *root(finished)).out)
    assert plan.tokens[0].ref in detail["ancestors"]
    assert plan.report.ref in detail["descendants"]


def test_info_tells_what_is_unfinished_or_damaged(copy: PipelineConfig, store: Store) -> None:
    plan = make_plan(copy)
    parts = plan.parts[copy.hook_points[0], "train"][0].ref
    n_parts, n_wanted = (
        require_record(Storage(copy.execution.root), ref).metrics["n_parts"]
        for ref in (parts, plan.snapshots[copy.hook_points[0], "train"].ref)
    )
    Path(copy.execution.root, layout.record_path(parts, 1)).unlink()
    flip_a_bit(Path(copy.execution.root, layout.record_path(plan.saes[0].ref)))
    found = store("info", *root(copy)).out
    (line,) = [line for line in found.splitlines() if line.startswith(parts)]
    assert "unfinished" in line
    assert f"{n_wanted - 1} of {n_parts}" in line
    assert "damaged records: 1 artefacts" in found
    assert f"{n_wanted - 1} of {n_parts}" in store("info", parts, *root(copy)).out
    assert "damaged" in store("info", plan.saes[0].ref, *root(copy)).out


def test_verify_reads_everything(finished: PipelineConfig, store: Store) -> None:
    found = store("verify", "--all", *root(finished))
    assert (found.code, found.err) == (0, "")
    assert found.last.endswith("all as recorded")


def test_verify_names_every_problem(copy: PipelineConfig, store: Store) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    harmed = harm(storage, plan)
    found = store("verify", "--all", *root(copy))
    assert found.code == 1
    lines = found.out.splitlines()
    assert len(lines) == len(harmed) + 1
    for address, path in harmed.items():
        assert any(line.startswith(f"{address}: ") and str(path) in line for line in lines)
    parts = plan.parts[copy.hook_points[0], "train"][0].ref
    for ref, n_problems in (
        (f"{parts}/part-00001", 0),
        (f"{parts}/part-00000", 1),
        (parts, 2),
        (plan.snapshots[copy.hook_points[0], "train"].ref, 2),
    ):
        found = store("verify", ref, *root(copy))
        assert (found.code, len(found.out.splitlines())) == (int(n_problems > 0), n_problems + 1)
    assert store("verify", f"{copy.execution.root}/{parts}/part-00002").code == 1, "an address with its root"


def test_a_part_record_that_is_gone_is_a_problem_of_the_snapshot(copy: PipelineConfig, store: Store) -> None:
    place = copy.hook_points[0], "train"
    parts, snapshot = make_plan(copy).parts[place][0].ref, make_plan(copy).snapshots[place].ref
    Path(copy.execution.root, layout.record_path(parts, 1)).unlink()
    found = store("verify", snapshot, *root(copy))
    assert found.code == 1
    assert f"{parts}/part-00001" in found.out


def test_repair_computes_what_is_damaged_and_nothing_else(copy: PipelineConfig, file: Path, store: Store) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    before = contents(copy)
    harmed = harm(storage, plan)
    stamps = {path: path.stat().st_mtime_ns for path in files(copy)}
    found = store("repair", file)
    assert found.code == 0, found.out + found.err
    assert found.last == f"repaired {len(harmed)} of {len(harmed)}"
    assert contents(copy) == before
    assert all(".json.damaged-" in path for path in strays(copy.execution.root))
    changed = {path for path, stamp in stamps.items() if not path.exists() or path.stat().st_mtime_ns != stamp}
    # What has no record is put anew, with its record; the rest is put back.
    assert {path for path in changed if plan.evaluations[0].ref not in str(path)} <= set(harmed.values())
    assert store("repair", file).last.endswith("all as recorded")


def test_repair_of_one_artefact_leaves_the_others(copy: PipelineConfig, file: Path, store: Store) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    harm(storage, plan)
    parts = plan.parts[copy.hook_points[0], "train"][0].ref
    assert store("repair", file, f"{parts}/part-00002").code == 0
    assert store("verify", f"{parts}/part-00002", *root(copy)).code == 0
    assert store("verify", "--all", *root(copy)).last.split(": ")[1] == "3 problems"


@pytest.mark.slow
def test_repair_mends_inputs_before_what_is_made_of_them(copy: PipelineConfig, file: Path, store: Store) -> None:
    storage, plan = Storage(copy.execution.root), make_plan(copy)
    assert plan.tokenizer
    assert plan.subject
    before = contents(copy)
    for ref, name in (
        (plan.segments[0][1].ref, "segment.json"),
        (plan.tokenizer.ref, "tokenizer.json"),
        (plan.tokens[0].ref, "train.parquet"),
        (plan.subject.ref, "model.safetensors"),
    ):
        flip_a_bit(Path(storage.full(require_record(storage, ref).path(name))))
    found = store("repair", file)
    assert found.last == "repaired 4 of 4", found.err
    assert contents(copy) == before


def test_repair_refuses_what_the_config_does_not_make(copy: PipelineConfig, file: Path, store: Store) -> None:
    found = store("repair", file, "saes/0123456789abcdef")
    assert found.code == 2
    assert "does not make it" in found.err


def test_gc_lists_and_deletes_only_when_told(copy: PipelineConfig, store: Store) -> None:
    before = files(copy)
    parts = make_plan(copy).parts[copy.hook_points[0], "train"][0].ref
    junk = Path(copy.execution.root, parts, "part-00099", "0" * 16, "part.parquet")
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"x" * 1000)
    assert store("gc", *root(copy)).last.startswith("nothing to delete"), "it is young"
    found = store("gc", "--grace", 0, *root(copy))
    assert "unrecorded files" in found.out
    assert found.last.startswith("1 things, 1 kB; nothing was deleted")
    assert junk.exists()
    assert store("gc", "--grace", 0, "--delete", *root(copy)).last == "deleted 1 things, 1 kB"
    assert files(copy) == before
    assert not junk.parents[1].exists()


def test_a_finished_root_has_no_garbage(finished: PipelineConfig, store: Store) -> None:
    assert store("gc", "--grace", 0, *root(finished)).last.startswith("nothing to delete")


@pytest.mark.parametrize("named", ["snapshot", "config"])
def test_export_of_a_snapshot_or_a_config(
    named: str, copy: PipelineConfig, file: Path, store: Store, tmp_path: Path
) -> None:
    storage, snapshot = Storage(copy.execution.root), make_plan(copy).snapshots[copy.hook_points[0], "heldout"].ref
    source = (snapshot, *root(copy)) if named == "snapshot" else (file, "--split", "heldout")
    found = store("export", source[0], tmp_path / "a.npy", "--format", "npy", *source[1:])
    assert found.code == 0, found.err
    expected = np.concatenate([block.act.copy() for block in iter_rows(storage, read_snapshot(storage, snapshot))])
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nonsense"), "nonsense: not an artefact's address"),
        (("info", "saes/0123456789abcdef"), "saes/0123456789abcdef: not in "),
        (("verify",), "name artefacts, or say --all"),
        (("verify", "--all", "saes/0123456789abcdef"), "name artefacts, or say --all"),
        (("verify", "/elsewhere/saes/0123456789abcdef"), "several roots"),
        (("gc", "--grace", "-1"), "argument --grace: '-1' is no number of hours"),
        (("repair",), "the following arguments are required: RECIPE|FILE"),
        (("repair", "defalut"), "Did you mean 'default'"),
        (("export", "saes/0123456789abcdef", "x", "--format", "npy"), "only snapshots of activations"),
        (("export", "activations/0123456789abcdef", "x", "--format", "npy"), "not there, or not finished"),
        (("export", "activations/0123456789abcdef", "s3://x/y", "--format", "npy"), "an export is a local file"),
        (("export", "activations/0123456789abcdef", "x", "--format", "csv"), "invalid choice: 'csv'"),
        (
            ("export", "activations/0123456789abcdef", "x", "--format", "npy", "--rows", "0"),
            "argument --rows: '0' is no number of rows",
        ),
        (("export", "toy", "x", "--format", "npy", "--hook-point", "tye"), "--hook-point: say which of toy"),
        (("export", "toy", "x", "--format", "npy", "--split", "heldout"), "toy holds nothing out"),
        (("nothing",), "invalid choice: 'nothing'"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: tuple[str, ...], message: str, finished: PipelineConfig, store: Store
) -> None:
    found = store(*arguments, *root(finished))
    assert found.code == 2
    assert message in found.err.splitlines()[-1]
    assert found.out == ""


@pytest.mark.parametrize("command", ["info", "verify --all", "gc"])
def test_a_root_that_is_not_there_is_not_made(command: str, store: Store, tmp_path: Path) -> None:
    found = store(*command.split(), "--root", tmp_path / "no-such-root")
    assert found.code == 2
    assert "no such folder" in found.err
    assert not (tmp_path / "no-such-root").exists()


def test_a_bucket_is_listed_verified_and_swept(
    finished: PipelineConfig, s3_root: str, store: Store, tmp_path: Path
) -> None:
    storage, plan = Storage(s3_root), make_plan(finished)
    source = Path(finished.execution.root)
    for path in source.glob("[!.]*/**/*"):
        if path.is_file():
            shutil.copy(path, tmp_path / "file")
            storage.put_file(tmp_path / "file", path.relative_to(source).as_posix())
    assert store("verify", "--all", "--root", s3_root).last.endswith("all as recorded")
    sae = require_record(storage, plan.saes[0].ref)
    storage.replace(sae.path("cfg.json"), b"torn")
    storage.replace(f"{sae.ref}/{'0' * 16}/a", b"nobody's")
    found = store("verify", "--all", "--root", s3_root)
    assert (found.code, len(found.out.splitlines())) == (1, 2)
    assert store("gc", "--grace", "0", "--delete", "--root", s3_root).last == "deleted 1 things, 8 bytes"
    assert (
        f"{len({spec.ref for spec in plan.specs()})} artefacts" in store("info", "--root", s3_root).out.splitlines()[0]
    )
    snapshot = plan.snapshots[finished.hook_points[0], "train"].ref
    found = store("export", snapshot, tmp_path / "a.parquet", "--format", "parquet", "--root", s3_root)
    assert found.code == 0, found.err


def files(config: PipelineConfig) -> set[Path]:
    """All files of a root, staging and Prefect's results aside."""
    return {path for path in Path(config.execution.root).glob("[!.]*/**/*") if path.is_file()}


def test_export_of_a_config_that_was_never_run(corpus: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "config.json").write_text(tiny_config(tmp_path / "root", corpus).model_dump_json())
    found = store("export", tmp_path / "config.json", tmp_path / "a.npy", "--format", "npy")
    assert (found.code, found.out) == (2, "")
    assert "not there, or not finished" in found.err
