"""A server of objects that costs next to nothing, so that clients are what is measured.

`object_server.py FOLDER PARENT_PID LATENCY_SECONDS STREAM_BYTES_PER_SECOND` serves the files of a folder as
`/bucket/key`, whatever the signature, and prints its URL. It answers HEAD and GET with or without a range, each
connection in a thread that sends from the page cache to the socket (sendfile). Latency is waited before every answer;
the rate of a stream is kept by the kernel (SO_MAX_PACING_RATE). 0: none.
"""

import contextlib
import ctypes
import email.utils
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1
SO_MAX_PACING_RATE = 47
RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)", re.IGNORECASE)


@contextlib.contextmanager
def object_server(folder: Path, latency: float = 0, stream_rate: float = 0) -> Iterator[str]:
    """The URL of a server in a process of its own, while the block runs.

    Args:
        folder: holds a folder per bucket.
        latency: seconds before every answer.
        stream_rate: bytes per second that one connection carries; 0: as many as it can.
    """
    command = [sys.executable, __file__, str(folder), str(os.getpid()), str(latency), str(int(stream_rate))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _answer(connection: socket.socket, folder: str, head: bytes, latency: float) -> None:
    method, target, _ = head.split(b"\r\n", 1)[0].split(b" ")
    path = folder + target.split(b"?")[0].decode()
    time.sleep(latency)
    if method not in (b"GET", b"HEAD") or not os.path.isfile(path):
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, end, status = 0, size, "200 OK"
        if found := RANGE.search(head):
            first, last = found.groups()
            start = int(first) if first else size - int(last)
            end = min(int(last) + 1, size) if first and last else size
            status = "206 Partial Content"
        fields = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {end - start}",
            f"Content-Range: bytes {start}-{end - 1}/{size}",
            "Accept-Ranges: bytes",
            'ETag: "0123456789abcdef0123456789abcdef"',
            f"Last-Modified: {email.utils.formatdate(0, usegmt=True)}",
            "Content-Type: application/octet-stream",
        ]
        connection.sendall("\r\n".join([*fields, "", ""]).encode(), socket.MSG_MORE if method == b"GET" else 0)
        while method == b"GET" and start < end:
            start += os.sendfile(connection.fileno(), file.fileno(), start, end - start)


def _serve(connection: socket.socket, folder: str, latency: float, rate: int) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rate:
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
    received = b""
    with contextlib.suppress(OSError), connection:
        while block := connection.recv(1 << 16):
            received += block
            while b"\r\n\r\n" in received:
                head, received = received.split(b"\r\n\r\n", 1)
                _answer(connection, folder, head, latency)


def main() -> None:
    """Serve until the parent dies."""
    folder, parent, latency, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection, folder, latency, rate), daemon=True).start()


if __name__ == "__main__":
    main()
