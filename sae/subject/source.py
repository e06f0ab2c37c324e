"""Where a model lies, and whether it is still the one that was pinned."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors

from sae.config import FINGERPRINT_CHARS
from sae.errors import InputError, TransientError
from sae.subject.config import HFModel, HFModelSpec

NOT_SAFETENSORS = (
    "no weights in safetensors there. Other formats can run code when they are read and are not loaded; convert them "
    "with `model.save_pretrained(folder)`."
)
DESCRIBING_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
"""What decides a local model's behaviour: config, weights, tokenizer files, its own code."""
HUB_SECONDS = 10.0
"""How long the hub may take to say what a name points to."""

T = TypeVar("T")


class ModelSource(NamedTuple):
    """Where transformers finds a model: a folder, or a name and a commit on the hub."""

    name: str
    revision: str | None
    config: HFModel
    local_files_only: bool = False
    """Whether the hub is out of reach, so that the local cache must do."""

    @property
    def where(self) -> dict[str, Any]:
        """What `from_pretrained` takes besides the name."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.config.trust_remote_code,
            "local_files_only": self.local_files_only,
        }


def pinned_source(spec: HFModelSpec) -> ModelSource:
    """Where a pinned model lies. Raises: InputError when a local folder is gone or has changed."""
    if not spec.pinned.startswith("files:"):
        return ModelSource(spec.config.name, spec.pinned, spec.config, local_files_only=not _hub_answers())
    folder = Path(os.path.expanduser(spec.config.name))
    found = folder_digest(folder)
    if found != spec.pinned:
        raise InputError(
            f"{folder}: the model's files changed after they were pinned ({spec.pinned}, now {found}). "
            f"Restore them, or run again with the new ones: they are another subject."
        )
    return ModelSource(str(folder), None, spec.config)


def folder_digest(folder: Path) -> str:
    """`files:<digest>` over the files that decide what a local model computes.

    Raises: InputError without a config or safetensors weights.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model there (no config.json). Check subject.name.")
    paths = sorted({path for pattern in DESCRIBING_FILES for path in folder.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError(f"{folder}: {NOT_SAFETENSORS}")
    hasher = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"files:{hasher.hexdigest()[:FINGERPRINT_CHARS]}"


def ask_hub(call: Callable[[], T]) -> T:
    """The answer of one question to the hub, or its error.

    A name server that does not answer blocks for minutes, whatever time-out a request has: hence the thread.

    Raises: TimeoutError when there is no answer in HUB_SECONDS.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(call())
        except BaseException as err:
            errors.append(err)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {HUB_SECONDS:.0f} seconds")
    return answers[0]


def _hub_answers() -> bool:
    """Whether the hub can be reached now.

    transformers asks the hub for optional files that a complete cache lacks, and tries each of them for 20 seconds.
    """
    import httpx2
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        ask_hub(lambda: get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS))
    except (OSError, httpx2.HTTPError):
        return False
    return True


@contextlib.contextmanager
def explained(source: ModelSource) -> Iterator[None]:
    """Name the model in the errors of transformers and of the hub's client, and keep their progress bars away."""
    import httpx2

    try:
        with quiet():
            yield
    except (ConnectionError, TimeoutError, httpx2.TransportError) as err:
        raise TransientError(f"{source.name}: the Hugging Face hub cannot be reached ({first_line(err)})") from err
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as err:
        if source.local_files_only and isinstance(err, OSError):
            raise _not_cached(source, err) from err
        raise _not_loaded(source, err) from err
    except Exception as err:
        # `tokenizers` raises Exception itself for a file that it cannot read.
        if type(err) is not Exception:
            raise
        raise _not_loaded(source, err) from err


def first_line(err: BaseException) -> str:
    """An error's message without the advice that libraries add below it; its type where there is no message."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)


def _not_loaded(source: ModelSource, err: Exception) -> InputError:
    kind = f"{type(err).__name__}: " if isinstance(err, KeyError | TypeError | AttributeError) else ""
    return InputError(f"{source.name}: cannot be loaded: {kind}{first_line(err)} Check the files of subject.name.")


def _not_cached(source: ModelSource, err: OSError) -> InputError | TransientError:
    from huggingface_hub import constants

    message = (
        f"{source.name} at {source.revision}: not all of it is in the local Hugging Face cache, and the hub cannot be "
        f"asked ({first_line(err)}). Download it once with `hf download {source.name}`, or name a local folder."
    )
    return InputError(message) if constants.is_offline_mode() else TransientError(message)


def check_weights(folder: Path) -> None:
    """Raises: InputError for a weight file that is damaged, or named by the index of a sharded model and missing."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
        raise InputError(f"{index}: not an index of weights ({first_line(err)}). Save the model again.") from err
    missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
    if missing:
        raise InputError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of the {len(names)} weight files that "
            f"{index.name} names). Copy the whole folder again."
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as err:
            raise InputError(f"{path}: not a readable safetensors file ({first_line(err)}). Copy it again.") from err


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars: who calls the library decides what is shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
