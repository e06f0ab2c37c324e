"""Ranges of S3 objects by plain HTTP, many at once: pieces, threads, and what is tried again.

The client of s3fs costs .8 to 2.3 CPU seconds per GB, because every byte passes through its event loop and is copied
several times; the standard library's, which reads from the socket into the caller's buffer, .2 (`make bench`). With
TLS it is 1.4 to .8, most of it for deciphering.

A piece is read on from where it broke off, after a pause, until it is complete or ATTEMPTS are used up: when nothing
comes, after two minutes at most, unless the endpoint asks for longer pauses (Retry-After).
"""

import itertools
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from sae.errors import TransientError
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import PIECE_BYTES, Range
from sae.store.storage.signed_get import AgainError, Piece, SignedGets

N_STREAMS = 32
"""Requests in flight. One stream of S3 carries some 80 MB/s."""
ATTEMPTS = 8
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 5.0
"""Pauses are drawn from [0, bound] (full jitter). The bound begins with the first and doubles up to the second."""


class HttpRanges:
    """Ranges of objects on S3.

    Args:
        n_streams: most requests in flight, over all threads that read.
    """

    is_remote = True

    def __init__(self, storage: Storage, n_streams: int = N_STREAMS) -> None:
        self._storage, self._n_streams = storage, n_streams
        self._gets = SignedGets(storage)
        self._threads = ThreadPoolExecutor(n_streams, thread_name_prefix="ranges")
        self._jitter = random.Random()

    def read(self, ranges: Sequence[Range]) -> list[bool]:
        """As RangeReader.read."""
        stopped = threading.Event()
        share = -(-sum(len(wanted.buffer) for wanted in ranges) // self._n_streams)
        pieces = [_divide(wanted, max(share, PIECE_BYTES)) for wanted in ranges]
        futures = [[self._threads.submit(self._fill, piece, stopped) for piece in one] for one in pieces]
        every = [future for one in futures for future in one]
        try:
            done, _ = wait(every, return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C: the buffers are the caller's again
            stopped.set()
            for future in every:
                future.cancel()
            wait(every)
        if error := next((error for future in every if future in done and (error := future.exception())), None):
            raise error
        return [all(future.result() for future in one) for one in futures]

    def announce(self, path: str, offset: int, n_bytes: int) -> None:
        """As RangeReader.announce: nothing is gained."""

    def close(self) -> None:
        """As RangeReader.close."""
        self._threads.shutdown()
        self._gets.close()

    def _fill(self, piece: Piece, stopped: threading.Event) -> bool:
        """Read one piece, in as many attempts as it takes. Returns: False when the file ends before.

        Raises: StoreError; TransientError after the last attempt, and when `stopped` is set.
        """
        began = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                return self._gets.get(piece, stopped)
            except AgainError as err:
                failure = err
            if attempt == ATTEMPTS - 1:
                break
            pause = self._jitter.uniform(0, min(PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS))
            if stopped.wait(max(pause, failure.after)):
                break
        raise TransientError(
            f"{self._storage.uri(piece.path)}: bytes {piece.offset} to {piece.end - 1} could not be read: {failure} "
            f"(attempt {attempt + 1} of {ATTEMPTS}, after {time.monotonic() - began:.0f} s)"
        ) from failure.__cause__


def _divide(wanted: Range, n_bytes: int) -> list[Piece]:
    """A range in pieces of at most `n_bytes`, of about the same size."""
    size = len(wanted.buffer)
    n_pieces = -(-size // n_bytes)
    cuts = [size * index // n_pieces for index in range(n_pieces)] + [size]
    return [
        Piece(wanted.path, wanted.offset + start, wanted.buffer[start:stop]) for start, stop in itertools.pairwise(cuts)
    ]
