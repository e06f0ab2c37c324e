"""Saved SAEs by their address: artefacts of a root, and folders that were copied out of one. Local or S3."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from sae.architectures import SAE
from sae.config import digest
from sae.errors import ConfigError
from sae.store.artefacts.records import Record, local_files, read_record, require_record
from sae.store.storage.filesystem import Storage
from sae.weights import CONFIG_FILE, WEIGHTS_FILE, load_sae

STAGE = "saes"
MAX_LISTED = 8
FILES = (CONFIG_FILE, WEIGHTS_FILE)
_ADDRESS = re.compile(r"^(?:(?P<root>.*)/)?(?P<ref>(?P<stage>[a-z]+)/[0-9a-f]{16})(?:/.*)?$")


class Place(NamedTuple):
    """An artefact, and the root it is in."""

    root: str
    ref: str

    @property
    def stage(self) -> str:
        """The first part of its address inside the root."""
        return self.ref.partition("/")[0]


def parse_address(uri: str) -> Place | None:
    """The artefact at `<root>/<stage>/<fingerprint>` or inside of it; None for an address of another form."""
    match = _ADDRESS.match(uri)
    return Place(match["root"] or ("." if match["root"] is None else "/"), match["ref"]) if match else None


def load(uri: str | os.PathLike[str], device: torch.device | str = "cpu") -> SAE:
    """An SAE, for the activations' own units: `.encode(x)`, `.decode(latents)`, `.config`.

    Args:
        uri: an SAE of a root, `<root>/saes/<fingerprint>` or anything inside it; a root that holds a single SAE; or a
            folder with `cfg.json` and `sae.safetensors`. Local or `s3://`.

    Raises: ConfigError when the address means no SAE, or several, or torch has no such device; StoreError when it is
        unfinished or damaged.
    """
    if not isinstance(uri, str | os.PathLike):
        raise ConfigError(f"sae.load takes the address of an SAE, a string or a path, not a {type(uri).__name__}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ConfigError(f"sae.load(..., device={str(device)!r}): torch cannot use it: {reason}") from err
    with saved_files(os.fspath(uri)) as folder:
        return load_sae(folder, device)


def digest_of(uri: str) -> str:
    """What an address of `load` holds: a digest of its two files. Raises: as `load`."""
    with saved_files(uri) as folder:
        load_sae(folder)
        return digest([xxhash.xxh3_64_hexdigest((folder / name).read_bytes()) for name in FILES])


@contextlib.contextmanager
def saved_files(uri: str) -> Iterator[Path]:
    """A local folder with the two files of the SAE at an address of `load`. Raises: as `load`."""
    uri = uri.rstrip("/") or uri
    place = parse_address(uri)
    if place is not None and place.stage == STAGE:
        storage = Storage(place.root)
        with local_files(storage, require_record(storage, place.ref), *FILES) as folder:
            yield folder
        return
    storage = Storage(uri)
    if any(storage.exists(name) for name in FILES):
        with contextlib.nullcontext(Path(storage.full(""))) if storage.is_local else storage.staging() as folder:
            for name in FILES:
                storage.fetch(name, folder)
            yield folder
        return
    if place is not None:
        raise ConfigError(
            f"{uri} is no SAE but one of the {place.stage}. Those of a root are at <root>/{STAGE}/<fingerprint>; "
            f"`sae-pipeline store info --root ROOT` lists them."
        )
    with local_files(storage, _only_sae(storage), *FILES) as folder:
        yield folder


def _only_sae(storage: Storage) -> Record:
    """The single finished SAE of a root."""
    refs = [f"{STAGE}/{name}" for name in storage.list(STAGE)]
    records = [record for ref in refs if (record := read_record(storage, ref)) is not None]
    if not records:
        raise ConfigError(
            f"{storage.root}: no SAE there. Give the address of one, <root>/{STAGE}/<fingerprint>, a root that holds "
            f"one, or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    if len(records) > 1:
        listed = ", ".join(f"{record.ref} ({_described(record)})" for record in records[:MAX_LISTED])
        more = f" and {len(records) - MAX_LISTED} more" if len(records) > MAX_LISTED else ""
        raise ConfigError(
            f"{storage.root} holds {len(records)} SAEs: {listed}{more}. Say which, as in {storage.uri(records[0].ref)}."
        )
    return records[0]


def _described(record: Record) -> str:
    config = record.spec["config"]["sae"]
    sizes = (f"{name} {config[name]:g}" for name in ("d_sae", "k", "l1_coefficient") if name in config)
    return ", ".join([config["architecture"], *sizes])
