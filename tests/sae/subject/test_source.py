"""A hub that cannot be reached costs seconds, not minutes, and what the cache has is used."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae.errors import InputError, TransientError
from sae.subject import source
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import resolve_pin
from sae.subject.load import load_source_tokenizer
from sae.subject.source import ask_hub, explained, pinned_source

COMMIT = "ab" * 20
LOAD = """
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.huggingface import resolve_pin
from sae.subject.load import _load_model, load_source_tokenizer
from sae.subject.source import explained, pinned_source

config = HFModel(name="someone/tiny")
found = pinned_source(HFModelSpec(config=config, pinned=resolve_pin(config)))
with explained(found):
    tokenizer, model = load_source_tokenizer(found), _load_model(found)[0]
print(found.revision, found.local_files_only, len(tokenizer), type(model).__name__)
"""


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(source, "HUB_SECONDS", 0.5)
        yield


def test_a_hub_that_never_answers_is_a_transient_error(silent_hub: None) -> None:
    with pytest.raises(
        TransientError, match=r"the hub cannot be asked \(.*\)\. Download it once with `hf download some"
    ):
        resolve_pin(HFModel(name="someone/tiny-that-nobody-has"))


def test_a_question_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "HUB_SECONDS", 0.1)
    with pytest.raises(TimeoutError, match="no answer in"):
        ask_hub(lambda: time.sleep(5))


def test_an_error_of_the_question_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        ask_hub(lambda: 1 / 0)


def test_a_cached_model_is_loaded_without_asking_an_unreachable_hub_for_each_file(model_folder, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model_folder("gpt2"), repository / "snapshots" / COMMIT)
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    # transformers alone tries each of six optional files for 23 seconds and says so in 66 lines.
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [COMMIT, "True", "300", "GPT2LMHeadModel"], done.stderr
    assert "Retrying" not in done.stderr


def test_an_incomplete_cache_says_what_to_do(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    spec = HFModelSpec(config=HFModel(name="someone/tiny"), pinned=COMMIT)
    found = pinned_source(spec)
    assert found.local_files_only
    with (
        pytest.raises(InputError, match=r"not all of it is in the local .* cache.*hf download someone/tiny"),
        explained(found),
    ):
        load_source_tokenizer(found)
