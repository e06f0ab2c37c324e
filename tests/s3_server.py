"""An S3 endpoint for tests: moto in a process of its own.

`s3_server.py PARENT_PID [ADDRESS]` prints its URL and serves, on loopback unless told otherwise.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

PR_SET_PDEATHSIG = 1


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing of every request."""


def main() -> None:
    """Serve until the parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return
    moto = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # S3 decides a conditional PUT at once; moto looks first and writes then.
        with one_at_a_time:
            return list(moto(environ, start_response))

    address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    server = make_server(address, 0, application, threaded=True, request_handler=_Quiet)
    # HTTP/1.1: a client's connections stay open, as with S3.
    _Quiet.protocol_version = "HTTP/1.1"
    print(f"http://{address}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
