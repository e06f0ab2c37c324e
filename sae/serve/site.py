"""The report's files over HTTP. Only what its commit record names is served, so no path can leave the report."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sae.errors import PipelineError
from sae.serve.refusals import Refused
from sae.store.artefacts.files import FileEntry
from sae.store.artefacts.record import Record
from sae.store.storage.filesystem import Storage

BLOCK_BYTES = 1 << 20
"""Read at once: what one request holds in memory."""
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "md": "text/markdown; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "parquet": "application/vnd.apache.parquet",
}
HASHED_FOLDER = "assets/"
"""Its files have their hash in their name, so a browser may keep them for ever."""


class Site:
    """The files of one report, by path."""

    def __init__(self, storage: Storage, record: Record) -> None:
        self._storage, self._record = storage, record
        self._entries = {entry.name: entry for entry in record.files}

    async def respond(self, request: Request) -> Response:
        """Answer GET and HEAD of a file; `/` is index.html.

        Raises: Refused: 404 when the report has no such file, 500 when it is not what the record says.
        """
        entry = self._entries.get(request.path_params["path"] or "index.html")
        if entry is None:
            raise Refused(404, "the report has no such file", "path", "Open / for the report; manifest.json lists all")
        tag = f'"{entry.xxh3}"'
        forever = entry.name.startswith(HASHED_FOLDER)
        headers = {
            "ETag": tag,
            "Cache-Control": "public, max-age=31536000, immutable" if forever else "no-cache",
        }
        if _matches(request.headers.get("if-none-match"), tag):
            return Response(status_code=304, headers=headers)
        headers |= {"Content-Length": str(entry.n_bytes), "Content-Type": _content_type(entry.name)}
        if request.method == "HEAD":
            return Response(headers=headers)
        first = await self._read(entry, 0)  # a file that is gone is known before the head is sent
        return StreamingResponse(self._blocks(entry, first), headers=headers)

    async def _blocks(self, entry: FileEntry, first: bytes) -> AsyncIterator[bytes]:
        yield first
        for start in range(BLOCK_BYTES, entry.n_bytes, BLOCK_BYTES):
            yield await self._read(entry, start)

    async def _read(self, entry: FileEntry, start: int) -> bytes:
        end = min(start + BLOCK_BYTES, entry.n_bytes)
        path = self._record.path(entry.name)
        try:
            data = await asyncio.to_thread(self._storage.read_bytes, path, start, end) if end > start else b""
        except PipelineError as err:
            raise _damaged(entry, "cannot be read") from err
        if len(data) != end - start:
            raise _damaged(entry, "is shorter than its record says")
        return data


def _damaged(entry: FileEntry, problem: str) -> Refused:
    return Refused(500, f"{entry.name} {problem}", "report", "Run the report stage again: it puts the file back")


def _content_type(name: str) -> str:
    return CONTENT_TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")


def _matches(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match header names the tag, strong or weak."""
    names = [name.strip().removeprefix("W/") for name in (header or "").split(",")]
    return tag in names or "*" in names
