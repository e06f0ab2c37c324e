"""What is particular to S3: time-outs, what its errors mean, and a create that only one writer wins.

Credentials come from where every AWS tool takes them: the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN), the profile that AWS_PROFILE names, or the machine's role; the endpoint from AWS_ENDPOINT_URL.
None is ever part of an address or an option here.
"""

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import aiohttp
from botocore import exceptions as botocore
from botocore.handlers import add_expect_header
from s3fs import S3FileSystem

from sae.errors import PipelineError, StoreError, TransientError

# Two layers try again: botocore a request, s3fs what it made of it. An endpoint that swallows packets costs
# ATTEMPTS x attempts x connect_timeout = 30 s before the task's own retry begins.
ATTEMPTS = 2
OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # other processes write to the same root
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"mode": "standard", "total_max_attempts": 3},
        "signature_version": "s3v4",  # also of addresses, which botocore signs the old way that new buckets refuse
    },
}
IMPATIENT_OPTIONS: dict[str, Any] = OPTIONS | {
    "config_kwargs": {
        "connect_timeout": 4,
        "read_timeout": 8,
        "retries": {"mode": "standard", "total_max_attempts": 2},
        "signature_version": "s3v4",
    }
}
"""For the check before work starts: a wrong address is known after 8 seconds, a silent endpoint after 16."""
UPLOAD_BYTES = 32 << 20
"""Larger files are uploaded in pieces of this size, ten at a time: at most 320 MiB of memory per upload."""

FAILURES = (botocore.BotoCoreError, aiohttp.ClientError)
"""What s3fs raises besides OSError. (It turns answers of the server into OSErrors, caused by a ClientError.)"""
_PASSING = (
    botocore.HTTPClientError,  # also read time-outs and closed connections
    botocore.ConnectionError,
    botocore.CredentialRetrievalError,
    botocore.MetadataRetrievalError,
    aiohttp.ClientError,
)
PASSING_STATUS = {408, 409, 425, 429}
_PASSING_CODES = {"RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "SlowDown"}
_CONFLICT_PAUSES = (0.1, 0.3, 1.0, 3.0)


class FileSystem(S3FileSystem):
    """s3fs without a wait that has no time-out: `Expect: 100-continue`, then silence."""

    _calm: Any = None

    async def set_session(self, refresh: bool = False, kwargs: Any = MappingProxyType({})) -> Any:
        """The client, made when it is first needed. (s3fs calls this before every request.)"""
        client = await super().set_session(refresh, kwargs)
        if client is not self._calm:
            client.meta.events.unregister("before-call.s3", add_expect_header)
            self._calm = client
        return client


def connect(patient: bool = True) -> FileSystem:
    """The file system of all buckets that the environment's credentials open. Nothing is asked of the server yet.

    Args:
        patient: keep trying for as long as work may wait; otherwise give up within seconds.
    """
    fs = FileSystem(**(OPTIONS if patient else IMPATIENT_OPTIONS))
    fs.retries = ATTEMPTS if patient else 1
    return fs


def status(err: BaseException) -> int | None:
    """The HTTP status of the answer behind an error of s3fs; None when no answer came."""
    response = getattr(err.__cause__, "response", None) or {}
    found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(found) if found is not None else None


def as_error(err: Exception, uri: str) -> PipelineError | None:
    """An error of s3fs as one of ours: what may pass is a TransientError, the rest a StoreError.

    Returns: None for an error that did not come from S3 (a local file, say).
    """
    if isinstance(err, FAILURES):
        kind = TransientError if isinstance(err, _PASSING) else StoreError
        return kind(f"{uri}: {_one_line(err)}{_credentials_hint(err)}")
    answer = status(err)
    if answer is None:
        return None
    code = str(err.__cause__.response["Error"].get("Code"))  # type: ignore[union-attr]
    text = f"{uri}: {_one_line(err)}"
    if code == "NoSuchUpload":  # given up by somebody who took it for abandoned: it can be begun again
        return TransientError(f"{uri}: the upload was given up while it was under way (S3 answered 404 {code})")
    if code == "NoSuchBucket":
        return StoreError(f"{uri}: there is no such bucket. Create it, or correct the root.")
    if answer == 404:
        return StoreError(f"{uri}: no such file (S3 answered 404)")
    if isinstance(err, PermissionError):
        return StoreError(
            f"{text} (S3 answered {answer} {code}). The credentials in the environment or the AWS profile are wrong "
            f"or may not get, put, list and delete objects here."
        )
    if answer >= 500 or answer in PASSING_STATUS or code in _PASSING_CODES:
        return TransientError(f"{text} (S3 answered {answer} {code})")
    return StoreError(f"{text} (S3 answered {answer} {code})")


def create(fs: Any, path: str, data: bytes) -> bool:
    """Write an object if there is none: a conditional PUT (If-None-Match).

    The object carries an id of this attempt. When the answer to a request that succeeded is lost, the client asks
    again and hears "exists": the id tells that it was us.

    Returns: False when somebody else was first.
    """
    attempt = uuid.uuid4().hex
    for pause in _CONFLICT_PAUSES:
        try:
            fs.pipe_file(path, data, mode="create", Metadata={"attempt": attempt})
            return True
        except OSError as err:
            answer = status(err)
            if answer not in (409, 412):
                raise
        if answer == 412:
            with contextlib.suppress(FileNotFoundError):  # deleted since: ask again
                return bool(fs.metadata(path).get("attempt") == attempt)
        # 409: another conditional write or a delete of this object was under way; nothing was decided.
        time.sleep(pause)
    raise TransientError(f"s3://{path}: other writers or deletes of this object are always under way")


def walk(fs: Any, place: str) -> Iterator[tuple[str, int, float]]:
    """Path (with its bucket), bytes and time of every object below `place`, a page at a time."""
    for bucket, page in _pages(fs, "list_objects_v2", place, ContinuationToken="NextContinuationToken"):
        for entry in page.get("Contents", ()):
            yield f"{bucket}/{entry['Key']}", int(entry["Size"]), entry["LastModified"].timestamp()


def torn_uploads(fs: Any, place: str) -> Iterator[tuple[str, float, str]]:
    """Path (with its bucket), beginning and id of every upload in pieces below `place` that has not ended."""
    markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
    for bucket, page in _pages(fs, "list_multipart_uploads", place, **markers):
        for entry in page.get("Uploads", ()):
            yield f"{bucket}/{entry['Key']}", entry["Initiated"].timestamp(), entry["UploadId"]


def abort_upload(fs: Any, path: str, upload: str) -> None:
    """Give up an upload in pieces; it is no error when it has ended."""
    bucket, _, key = path.partition("/")
    with contextlib.suppress(FileNotFoundError):
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


def _pages(fs: Any, listing: str, place: str, **markers: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The bucket of `place` and each page of a listing of what lies below it.

    Args:
        markers: what to send for the next page -> the field of this one that holds it.
    """
    bucket, _, key = place.partition("/")
    more: dict[str, str] = {}
    while True:
        page = fs.call_s3(listing, Bucket=bucket, Prefix=f"{key}/" if key else "", **more)
        yield bucket, page
        if not page.get("IsTruncated"):
            return
        more = {marker: page[field] for marker, field in markers.items()}


def _one_line(err: Exception) -> str:
    """The error's text in one line, without user information that an endpoint's URL may carry."""
    return re.sub(r"://[^/@\s]*@", "://", " ".join(str(err).split()))


def _credentials_hint(err: Exception) -> str:
    if isinstance(err, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return ". Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return ""
