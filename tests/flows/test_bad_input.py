"""What is wrong with a config or its inputs is one line that says what, where and what to do; exit code 2, no work."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from sae.errors import ConfigError, InputError
from sae.extract.corpus import commit_segment, training_texts
from sae.extract.tokens import tokenize_segment
from sae.plan import PipelineConfig, Plan, make_plan
from sae.preflight import check_plan, check_tokens
from sae.store import layout
from sae.store.storage.filesystem import Storage
from sae.subject.embedded import train_tokenizer
from tests.flows.bad_input import (
    Box,
    many,
    newer_format,
    put,
    text,
)
from tests.flows.bad_input_cases import CASES, DOCUMENTS
from tests.flows.conftest import tiny_config
from tests.flows.models import save_model

NO_SERVER = "http://127.0.0.1:9/api"
"""Nobody listens there: a command that asks Prefect for anything fails, and not with the message that is expected."""


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_model("gpt2", folder)
    return folder


@pytest.fixture
def box(tmp_path: Path, corpus: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setenv("PREFECT_API_URL", NO_SERVER)
    root = tmp_path / "root"
    config = tiny_config(root, corpus).model_dump(mode="json", exclude={"execution": {"root"}})
    return Box(tmp_path, saved_model, config, root=str(root))


def artefacts(root: str) -> Iterator[Path]:
    """Everything under a root but the empty folder that the probe for writing leaves."""
    return (path for path in Path(root).rglob("*") if path.name != layout.STAGING)


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line_and_exit_code_2(case: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CASES[case]
    change(box)
    code = main(box.command_line())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert re.search(message, captured.err), captured.err
    assert code == 2
    assert list(artefacts(box.root)) == []


@pytest.mark.parametrize(
    "case", ["unknown key", "a wrong hook point", "a NUL character", "pickled weights", "NaN", "a root below a file"]
)
def test_the_command_itself_ends_without_a_traceback(case: str, box: Box) -> None:
    change, message = CASES[case]
    change(box)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *box.command_line()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_root_of_a_newer_format_is_left_alone(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    newer_format(box)
    before = sorted(artefacts(box.root))
    assert main(box.command_line()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"record\.json: .*format 999.*another root", error), error
    assert sorted(artefacts(box.root)) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_plan_is_refused(
    box: Box, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box.root = str(small_disk / "root")
    box.put("subject.d_mlp", 4096)
    assert main(box.command_line()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(
        r"root '.*' has 4\.\d+ MB free, the run needs about [\d.]+ MB \([\d.]+ MB for [\d,]+ x 4096 activations of "
        r"gpt_neox\.layers\.0\.mlp\.act\)\. Free some, lower activations\.n_tokens, or choose another with --root",
        error,
    )
    assert list(artefacts(box.root)) == []


def test_unreadable_files_among_readable_ones_are_counted(tmp_path: Path, box: Box) -> None:
    text(DOCUMENTS | {"latin.txt": b"caf\xe9", "nothing.txt": b""})(box)
    plan = make_plan(PipelineConfig.model_validate(box.config))
    assert plan.tallies[0].skipped == ["latin.txt: not UTF-8 (byte 3 is 0xe9)", "nothing.txt: empty"]
    assert plan.tallies[0].n_documents == len(DOCUMENTS)


def tokenized(box: Box) -> tuple[Storage, Plan]:
    """The plan, with its corpus tokenized."""
    plan = make_plan(PipelineConfig.model_validate(box.config))
    storage = Storage(box.root)
    ((corpus_source, segment),) = plan.segments
    commit_segment(storage, segment, corpus_source)
    train_tokenizer(storage, plan.tokenizer, training_texts(storage, segment.ref, corpus_source))
    tokenize_segment(storage, plan.tokens[0], corpus_source)
    return storage, plan


def test_a_batch_larger_than_the_tokenized_corpus_is_refused(box: Box) -> None:
    many(put("activations.n_tokens", None), put("saes.0.batch_rows", 20_000))(box)
    storage, plan = tokenized(box)
    check_plan(plan)  # the text might have had so many tokens
    with pytest.raises(
        ConfigError, match=r"saes\.0\.batch_rows: 20000, but the corpus has \d+ training tokens\. Lower"
    ):
        check_tokens(storage, plan)


def test_held_out_text_that_fills_no_context_is_refused(box: Box) -> None:
    # The held-out documents are long enough in bytes and too short in tokens.
    many(put("corpus.heldout_fraction", 0.04), put("corpus.context_tokens", 800))(box)
    storage, plan = tokenized(box)
    check_plan(plan)
    with pytest.raises(
        InputError, match=r"heldout_fraction: 0\.04 holds nothing out: the held-out text fills no context"
    ):
        check_tokens(storage, plan)


def test_asking_for_more_tokens_than_there_are_is_a_warning_with_the_number(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    box.put("activations.n_tokens", 10**9)
    storage, plan = tokenized(box)
    check_plan(plan)
    check_tokens(storage, plan)
    (message,) = caplog.messages
    assert re.fullmatch(r"activations\.n_tokens: 1,000,000,000 asked for, the corpus has [\d,]+ .*", message)


@pytest.mark.parametrize(
    "title", ["{config.seed} %s {0} {{", "<script>alert(1)</script>", "Ünïcödé 漢字 🙂", "", "x" * 300]
)
def test_a_strange_title_is_only_a_title(title: str, box: Box) -> None:
    box.put("report.title", title)
    plan = make_plan(PipelineConfig.model_validate(box.config))
    check_plan(plan)
    assert plan.report.config.title == title
