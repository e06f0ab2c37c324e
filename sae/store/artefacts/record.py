"""One commit record: what it says, and its text, which holds a checksum of itself."""

import json
from typing import Any

import xxhash
from pydantic import Field, ValidationError

from sae.config import FrozenConfig
from sae.errors import DamagedError, StoreError
from sae.store import layout
from sae.store.artefacts.files import FileEntry
from sae.store.artefacts.provenance import Provenance

FORMAT = 2
"""Version of the on-disk contract (FORMAT.md)."""
AGAIN = "Run the same command again: it is computed again and put back."
"""What to do about damage."""


class Record(FrozenConfig):
    """The commit record of an artefact or of one part of it."""

    format: int = FORMAT
    ref: str
    part: int | None = None
    code_version: int
    spec: dict[str, Any]
    inputs: dict[str, str]
    content: str
    """Digest of the files: the name of the folder they lie in."""
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Sizes and headline numbers; a function of the content."""
    produced: Provenance

    @property
    def folder(self) -> str:
        """Where the files lie, relative to the root."""
        return layout.content_folder(self.ref, self.content, self.part)

    def path(self, name: str) -> str:
        """The path of one of its files. Raises: StoreError when the record has no such file."""
        if not any(entry.name == name for entry in self.files):
            raise StoreError(f"{self.ref}: its record names no file {name!r}")
        return f"{self.folder}/{name}"


def encode(record: Record) -> bytes:
    """The text of a record, with its checksum."""
    fields = record.model_dump(mode="json")
    fields["checksum"] = _checksum(fields)
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def _checksum(fields: dict[str, Any]) -> str:
    """xxh3-64 of the canonical JSON of all other fields, in hex."""
    others = {name: value for name, value in fields.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())


def decode(data: bytes, uri: str, ref: str, part: int | None) -> Record:
    """The record of `ref` (or its part) from its text.

    Args:
        uri: where the text was found, for messages.

    Raises: DamagedError when it is not what was written; StoreError when it is of a newer format.
    """

    def damaged(why: str) -> DamagedError:
        return DamagedError(f"{uri}: the commit record is damaged ({why}). {AGAIN}", ref, part)

    try:
        fields = json.loads(data.decode())
    except ValueError as err:
        raise damaged(f"not JSON: {err}") from err
    if not isinstance(fields, dict):
        raise damaged("not a JSON object")
    found = fields.get("format")
    if isinstance(found, int) and found > FORMAT and not _is_flipped_format(fields):
        raise StoreError(
            f"{uri}: written in format {found}, this version reads up to {FORMAT}. "
            f"Use a newer sae-pipeline, or another root."
        )
    if fields.get("checksum") != _checksum(fields):
        raise damaged("it differs from its own checksum")
    try:
        record = Record.model_validate({name: value for name, value in fields.items() if name != "checksum"})
    except ValidationError as err:
        raise damaged(f"{err.error_count()} problems; {err.errors()[0]['msg']}") from err
    if (record.ref, record.part) != (ref, part):
        raise damaged(f"it is the record of {record.ref}{'' if record.part is None else f', part {record.part}'}")
    return record


def _is_flipped_format(fields: dict[str, Any]) -> bool:
    """Whether one flipped bit of the format's digit makes a record of ours look newer."""
    return (fields["format"] ^ FORMAT).bit_count() == 1 and fields.get("checksum") == _checksum(
        fields | {"format": FORMAT}
    )
