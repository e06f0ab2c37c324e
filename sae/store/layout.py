"""Every path inside a root, as functions; no path is built elsewhere.

<root>/<stage>/<fingerprint>/record.json            the commit record of a whole artefact
<root>/<stage>/<fingerprint>/<content>/<file>       its files, under the digest of their content
<root>/<stage>/<fingerprint>/part-00007.json        the commit record of one part
<root>/<stage>/<fingerprint>/part-00007/<content>/<file>
<root>/parts/<fingerprint>/index/0000100-0000199-<hash>.parquet   what the records of these parts say, in one file
<root>/<stage>/<fingerprint>/*.json.damaged-xxxxxxxx   a damaged record, set aside when the artefact was computed again
<root>/<stage>/<fingerprint>/checkpoints/<attempt>/ work in progress: what a retry resumes from
<root>/<...>/<content>/.collected-xxxx              a collector is at work there (buckets only)
<root>/.staging/<pid>-xxxx/                         one attempt's unfinished files
"""

STAGING = ".staging"
RESULTS = ".prefect"
"""Prefect's result files: a cache, safe to delete."""
COLLECTED = ".collected-"
"""How the name of a collector's note begins (claims.py)."""


def artefact_folder(ref: str) -> str:
    """Folder of the artefact `stage/fingerprint`."""
    return ref


def record_path(ref: str, part: int | None = None) -> str:
    """The commit record of an artefact, or of one part of it."""
    return f"{ref}/record.json" if part is None else f"{ref}/part-{part:05d}.json"


def damaged_path(record: str, digest: str) -> str:
    """Where the damaged record at the path `record` is set aside. `digest`: of its bytes."""
    return f"{record}.damaged-{digest}"


def content_folder(ref: str, content: str, part: int | None = None) -> str:
    """Folder of the files that a record names. `content` is the digest of those files."""
    return f"{ref}/{content}" if part is None else f"{ref}/part-{part:05d}/{content}"


def index_folder(ref: str) -> str:
    """Folder of the files that repeat what the records of many parts say."""
    return f"{ref}/index"


def index_path(ref: str, first: int, last: int, xxh3: str) -> str:
    """The file for the parts `first` to `last`. `xxh3`: of its bytes."""
    return f"{index_folder(ref)}/{first:07d}-{last:07d}-{xxh3}.parquet"


def checkpoint_folder(ref: str, attempt: str | None = None) -> str:
    """Folder of the checkpoints of all training calls, or of one; deleted after the commit."""
    return f"{ref}/checkpoints" if attempt is None else f"{ref}/checkpoints/{attempt}"


def checkpoint_data(ref: str, attempt: str, step: int) -> str:
    """The tensors of a checkpoint."""
    return f"{checkpoint_folder(ref, attempt)}/step-{step:08d}.safetensors"


def checkpoint_part(ref: str, attempt: str, step: int, part: int) -> str:
    """The tensors of a checkpoint that one of several processes writes."""
    return f"{checkpoint_folder(ref, attempt)}/step-{step:08d}.part-{part:05d}.safetensors"


def checkpoint_pointer(ref: str, attempt: str, step: int) -> str:
    """The small file that makes a checkpoint count."""
    return f"{checkpoint_folder(ref, attempt)}/step-{step:08d}.json"
