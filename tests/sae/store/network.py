"""A network that misbehaves, between a client and an S3 endpoint: what it breaks, it breaks on real sockets.

A fault is what happens to one request:

    ""              it is passed on, and its answer comes back
    "503 SlowDown"  this status and code are answered at once; "503 SlowDown 2" with Retry-After: 2
    "drop"          the connection ends before the endpoint hears of it
    "lose"          the endpoint does it, the connection ends before the answer
    "silent"        the endpoint does it, no answer comes and the connection stays
    "reset"         a TCP reset in the middle of the answer's body
    "truncate"      an orderly end of the connection there
    "stall"         nothing more comes there, and the connection stays
    "flip"          one byte of the answer's body is another
    "torn"          a TCP reset in the middle of the request's body
    "unconditional" it is passed on without If-None-Match
    "whole"         it is passed on without Range
"""

import contextlib
import http.client
import http.server
import os
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

SO_MAX_PACING_RATE = 47
BLOCK_BYTES = 1 << 16
WITHOUT = {"unconditional": "If-None-Match", "whole": "Range"}
READING = ("503 SlowDown", "drop", "reset", "truncate", "stall", "flip")
"""What may happen to whoever reads."""


class Request(NamedTuple):
    """A request as it arrives at the network."""

    method: str
    path: str
    """With the bucket, without the query."""
    range: str
    before: int
    """Requests with this method and path that came before it."""
    again: int
    """Those of them that asked for the same range, too."""

    def number(self, seed: int) -> int:
        """The same on every run: of the bucket's name nothing is used, nor of the order in which requests arrive."""
        key = f"{seed} {self.method} {self.path.split('/', 2)[-1]} {self.range} {self.again}"
        return xxhash.xxh3_64_intdigest(key.encode())


Fault = Callable[[Request], str]


def on(method: str, ending: str, *faults: str) -> Fault:
    """The faults of the first such requests, in order; later ones pass."""
    return lambda request: (
        faults[request.before]
        if request.method == method and request.path.endswith(ending) and request.before < len(faults)
        else ""
    )


def lottery(seed: int, share: float, kinds: Sequence[str], method: str = "GET") -> Fault:
    """A fault for this share of the requests, one kind as often as another."""

    def draw(request: Request) -> str:
        number = request.number(seed)
        hit = request.method == method and number % 10_000 < share * 10_000
        return kinds[number // 10_000 % len(kinds)] if hit else ""

    return draw


class Network(http.server.ThreadingHTTPServer):
    """A hop to an endpoint in threads of this process.

    Args:
        endpoint: its URL.
        latency: seconds before every answer.
        stream_rate: bytes per second of one connection's answers, kept by the kernel; 0: as many as go through.
        tls: what the hop proves itself with, if it speaks TLS.
    """

    request_queue_size = 128

    def __init__(
        self, endpoint: str, latency: float = 0, stream_rate: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Hop)
        self._scheme = "https" if tls else "http"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.endpoint, self.latency, self.stream_rate = endpoint.removeprefix("http://"), latency, stream_rate
        self.fault: Fault = lambda request: ""
        self.seen: list[Request] = []
        self.connections: set[object] = set()
        """Those on which a request arrived."""
        self.faults: Counter[str] = Counter()
        """What happened how often; "" counts what was passed on."""
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        """What a client takes for the endpoint's."""
        return f"{self._scheme}://127.0.0.1:{self.server_port}"

    def arrive(self, method: str, path: str, byte_range: str) -> tuple[Request, str]:
        """Count a request. Returns: the request and what happens to it."""
        with self._lock:
            request = Request(
                method, path, byte_range, self._counts[method, path], self._counts[method, path, byte_range]
            )
            self._counts.update([(method, path), (method, path, byte_range)])
        fault = self.fault(request)
        with self._lock:
            self.seen.append(request)
            self.faults[fault] += 1
        return request, fault

    def hang_up(self) -> None:
        """End every connection, as an endpoint does with idle ones."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection, then serve it in its thread."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection when it has ended."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go away when they like."""


@contextlib.contextmanager
def network(
    endpoint: str, latency: float = 0, stream_rate: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[Network]:
    """A network that works until it gets a fault, while the block runs. Arguments: of Network."""
    with Network(endpoint, latency, stream_rate, tls) as hop:
        thread = threading.Thread(target=hop.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hop
        finally:
            hop.ended.set()
            hop.shutdown()
            thread.join()


class _Hop(http.server.BaseHTTPRequestHandler):
    server: Network
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None: ...

    def _pass(self) -> None:
        self.server.connections.add(self.client_address)
        request, fault = self.server.arrive(
            self.command, self.path.split("?")[0], self.headers.get("Range", "").removeprefix("bytes=")
        )
        n_bytes = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(n_bytes // 2 if fault == "torn" else n_bytes)
        if fault == "torn":
            self._reset()
            return
        if len(body) < n_bytes:  # the client has died
            self.close_connection = True
            return
        time.sleep(self.server.latency)
        if fault[:1].isdigit():
            self._refuse(*fault.split())
        elif fault == "drop":
            self._end()
        else:
            self._ask(request, fault, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def _refuse(self, status: str, code: str, retry_after: str = "") -> None:
        text = f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
        self.send_response_only(int(status))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if status == "301":
            self.send_header("x-amz-bucket-region", "eu-north-1")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _ask(self, request: Request, fault: str, body: bytes) -> None:
        headers = dict(self.headers)
        if fault in WITHOUT:
            headers.pop(WITHOUT[fault], None)
        there = http.client.HTTPConnection(self.server.endpoint)
        with contextlib.closing(there):
            there.request(self.command, self.path, body, headers)
            with there.getresponse() as answer:
                if fault == "silent":
                    self._wait()
                elif fault == "lose":
                    answer.read()
                    self._end()
                else:
                    self._return(answer, fault, request.number(0))

    def _return(self, answer: http.client.HTTPResponse, fault: str, number: int) -> None:
        """Pass an answer on; `number` says where in its body the fault is."""
        known = answer.length if self.command != "HEAD" else 0
        text = b"" if known is not None else answer.read()
        n_bytes = known if known is not None else len(text)
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding") and (
                name.lower() != "content-length" or self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(n_bytes))
        if self.server.stream_rate:
            self.connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, self.server.stream_rate)
        self.end_headers()
        place = number % n_bytes if n_bytes else 0
        n_sent = 0
        while n_sent < n_bytes:
            block = bytearray(text or answer.read(min(BLOCK_BYTES, n_bytes - n_sent)))
            here = n_sent <= place < n_sent + len(block)
            if here and fault == "flip":
                block[place - n_sent] ^= 0x10
            if here and fault in ("reset", "truncate", "stall"):
                self.wfile.write(block[: place - n_sent])
                break
            self.wfile.write(block)
            n_sent += len(block)
        if fault == "reset":
            self._reset()
        elif fault == "truncate":
            self._end()
        elif fault == "stall":
            self._wait()

    def _end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """What was sent and has not been read yet is lost, and so is the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _wait(self) -> None:
        """Until the client gives up, or the network ends."""
        self.close_connection = True
        self.connection.settimeout(0.1)
        while not self.server.ended.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
