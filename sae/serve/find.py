"""Which report an address means."""

import re

from sae.errors import ConfigError
from sae.store.artefacts.records import Record, read_record, require_record
from sae.store.storage.filesystem import Storage

STAGE = "reports"
_ADDRESS = re.compile(rf"^(?:(?P<root>.*)/)?(?P<ref>{STAGE}/[0-9a-f]{{16}})(?:/.*)?$")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


def find_report(uri: str) -> tuple[Storage, Record]:
    """The report that an address means, and the store it lies in.

    Args:
        uri: a report's folder or anything inside it (its index.html), or a run's root: then its newest report.

    Raises: ConfigError when there is no report; StoreError when it was never finished.
    """
    match = _ADDRESS.match(uri)
    if match is None:
        return _newest(Storage(uri))
    storage = Storage(match["root"] or ("." if match["root"] is None else "/"))
    return storage, require_record(storage, match["ref"])


def _newest(storage: Storage) -> tuple[Storage, Record]:
    refs = [f"{STAGE}/{name}" for name in storage.list(STAGE) if _FINGERPRINT.fullmatch(name)]
    found = [record for ref in refs if (record := read_record(storage, ref)) is not None]
    if not found:
        raise ConfigError(
            f"{storage.root}: no report there. Give a report's folder, its index.html, or the root of a run that has "
            f"finished one (sae-pipeline run)."
        )
    return storage, max(found, key=lambda record: (record.produced.created, record.ref))
