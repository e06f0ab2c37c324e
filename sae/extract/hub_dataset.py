"""Documents of a Hugging Face data set, streamed. The only module that imports `datasets`, and only when used."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

from sae.config import digest
from sae.errors import ConfigError, InputError, TransientError
from sae.extract.config import DatasetSource
from sae.subject.source import HUB_SECONDS, ask_hub, first_line


def dataset_digest(source: DatasetSource) -> str:
    """What names a data set on the hub: its commit, and which documents of it are used.

    Raises: InputError when the hub has no such data set; TransientError when it cannot be reached.
    """
    revision = _pinned_revision(source)
    return digest(source.model_dump(mode="json") | {"revision": revision})


def iter_dataset(source: DatasetSource, skip: Callable[[str, str], None]) -> Iterator[tuple[str, str]]:
    """(name, text) of the first documents; names are row numbers.

    Raises:
        ConfigError: `datasets` is not installed.
        InputError: no such data set, subset, split or column.
    """
    try:
        import datasets
    except ImportError as err:
        raise ConfigError(
            f"data set {source.name!r}: streaming needs the package `datasets`. "
            f"Run: pip install 'sae-pipeline[datasets]'"
        ) from err
    local = os.path.isdir(source.name)
    revision = None if local else _pinned_revision(source)
    try:
        stream = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=revision, streaming=True
        )
        rows = itertools.islice(iter(stream), source.n_documents)
        for number, row in enumerate(rows):
            yield from _document(source, number, row, skip)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as err:
        raise InputError(f"data set {source.name!r} (split {source.split!r}): {first_line(err)}") from err
    except OSError as err:
        raise TransientError(f"data set {source.name!r}: {first_line(err)}") from err


def _document(
    source: DatasetSource, number: int, row: dict[str, Any], skip: Callable[[str, str], None]
) -> Iterator[tuple[str, str]]:
    where = f"data set {source.name!r}, row {number}"
    if source.text_field not in row:
        raise InputError(
            f"{where}: no column {source.text_field!r}; its columns are {', '.join(map(repr, row))}. Set text_field."
        )
    value = row[source.text_field]
    if value is None:
        skip(str(number), "null")
    elif isinstance(value, str):
        yield str(number), value
    else:
        raise InputError(f"{where}: the text is a {type(value).__name__}, expected a string. Set text_field.")


def _pinned_revision(source: DatasetSource) -> str:
    """The commit that `revision` (or the default branch) points to."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        ask = functools.partial(HfApi().dataset_info, source.name, revision=source.revision, timeout=HUB_SECONDS)
        return str(ask_hub(ask).sha)
    except RevisionNotFoundError as err:
        raise InputError(f"data set {source.name!r} has no revision {source.revision!r}") from err
    except (RepositoryNotFoundError, HFValidationError) as err:
        raise InputError(
            f"no data set {source.name!r} on the Hugging Face hub, and no folder of that name. For a private one, "
            f"set HF_TOKEN."
        ) from err
    except OfflineModeIsEnabled as err:
        raise InputError(f"data set {source.name!r}: HF_HUB_OFFLINE is set, and a stream comes from the hub") from err
    except (OSError, httpx2.HTTPError) as err:
        raise TransientError(
            f"data set {source.name!r}: the Hugging Face hub cannot be asked ({first_line(err)})"
        ) from err
