"""Pinning a Hugging Face model: which commit or which files are meant, recorded before anything is computed."""

import functools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from sae.errors import InputError, TransientError
from sae.store.artefacts.records import Record, commit
from sae.store.storage.filesystem import Storage
from sae.subject.config import HFModel, HFModelSpec
from sae.subject.load import auto_class, is_causal
from sae.subject.source import (
    HUB_SECONDS,
    NOT_SAFETENSORS,
    ask_hub,
    explained,
    first_line,
    folder_digest,
    pinned_source,
)

COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_pin(config: HFModel) -> str:
    """What `config` points to now: a commit of the hub, or `files:<digest>` of a local folder.

    Without a network the local cache answers.

    Raises:
        InputError: no such model or revision, or no safetensors weights.
        TransientError: the hub cannot be reached and the cache does not know the model.
    """
    folder = Path(os.path.expanduser(config.name))
    if folder.is_dir():
        if config.revision is not None:
            raise InputError(f"{folder}: a local folder has no revisions. Remove subject.revision.")
        return folder_digest(folder)
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise InputError(f"{config.name}: no such folder. Check subject.name.")
    cached = _cached_commit(config)
    if cached is not None and cached == config.revision:
        return cached
    return _hub_commit(config, cached)


def pin_subject(storage: Storage, spec: HFModelSpec) -> Record:
    """Commit a description of the model (`subject.json`). The weights stay where they are.

    Raises: InputError when the model's config cannot be read, or a local folder changed since it was pinned.
    """
    from transformers import AutoConfig

    started = time.perf_counter()
    source = pinned_source(spec)
    with explained(source):
        config = AutoConfig.from_pretrained(source.name, **source.where)
        with torch.device("meta"):
            skeleton = auto_class(config).from_config(config, trust_remote_code=source.config.trust_remote_code)
    text = config.get_text_config()
    metrics: dict[str, Any] = {
        "class": type(skeleton).__name__,
        "d_model": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "causal": is_causal(config),
        "n_parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
    }
    described = {"name": spec.config.name, "pinned": spec.pinned, "dtype": spec.config.dtype} | metrics
    with storage.staging() as folder:
        (folder / "subject.json").write_text(json.dumps(described, indent=1) + "\n")
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def _hub_commit(config: HFModel, cached: str | None) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        ask = functools.partial(HfApi().model_info, config.name, revision=config.revision, timeout=HUB_SECONDS)
        info = ask_hub(ask)
    except RevisionNotFoundError as err:
        raise InputError(f"{config.name} has no revision {config.revision!r}. Check subject.revision.") from err
    except GatedRepoError as err:
        raise InputError(f"{config.name}: access must be asked for on its page; then set HF_TOKEN.") from err
    except (RepositoryNotFoundError, HFValidationError) as err:
        raise InputError(
            f"no model {config.name!r} on the Hugging Face hub, and no folder of that name. Check subject.name; "
            f"for a private model set HF_TOKEN."
        ) from err
    except (OfflineModeIsEnabled, OSError, httpx2.HTTPError) as err:
        if cached is not None:
            return cached
        message = (
            f"{config.name}: not in the local Hugging Face cache, and the hub cannot be asked "
            f"({first_line(err)}). Download it once with `hf download {config.name}`, or name a local folder."
        )
        raise (InputError if isinstance(err, OfflineModeIsEnabled) else TransientError)(message) from err
    if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
        raise InputError(f"{config.name} at {info.sha}: {NOT_SAFETENSORS}")
    return str(info.sha)


def _cached_commit(config: HFModel) -> str | None:
    """The commit in the local cache that has config and safetensors weights, if any."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    except HFValidationError as err:
        raise InputError(f"{config.name!r} is neither a folder nor a name on the Hugging Face hub: {err}") from err
    if not isinstance(path, str):
        return None
    folder = Path(path).parent
    return folder.name if COMMIT.fullmatch(folder.name) and any(folder.glob("*.safetensors")) else None
