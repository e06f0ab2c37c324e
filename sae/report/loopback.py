"""A report's files over HTTP for the browser on this machine: what a notebook frames."""

import http.server
import json
import mimetypes
import threading
from typing import Any

from sae.errors import PipelineError
from sae.report.finished import FinishedReport

HOST = "127.0.0.1"
_lock = threading.Lock()
_servers: dict[tuple[str, str], "_Server"] = {}


def address_of(report: FinishedReport) -> str:
    """Where the report is served: http://127.0.0.1:PORT. The first call for its folder starts the server.

    The server is a daemon thread of this process and ends with it; it answers for the files of manifest.json alone.

    Raises: StoreError when the report has no manifest.
    """
    key = (report.storage.root, report.folder)
    with _lock:
        if key not in _servers:
            server = _Server(report)
            threading.Thread(target=server.serve_forever, name=f"report {report.folder}", daemon=True).start()
            _servers[key] = server
        return f"http://{HOST}:{_servers[key].server_port}"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, report: FinishedReport) -> None:
        self.report = report
        self.names = {"manifest.json"} | {entry["name"] for entry in json.loads(report.read("manifest.json"))["files"]}
        super().__init__((HOST, 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """A file of the report; `/` is index.html."""
        name = self.path.partition("?")[0].lstrip("/") or "index.html"
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            # A page elsewhere that has its name point here could read the report.
            self.send_error(403)
        elif name not in self.server.names:
            self.send_error(404)
        else:
            try:
                data = self.server.report.read(name)
            except PipelineError as err:
                self.send_error(500, explain=str(err))
            else:
                self._send(name, data)

    do_HEAD = do_GET

    def _send(self, name: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-cache")
        # Data files are scripts: without this, any page could load them and read the report.
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: a notebook's output is the reader's."""
