"""A chat endpoint on loopback that explains by keyword: a real HTTP server with scripted faults.

Explaining, it names the piece that is marked most often. Judging, it answers whether that word is in the passage
(detection) or in the marked pieces (fuzzing). So its scores follow from the contexts and can be worked by hand.
"""

import contextlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "planted-key-Zq7-that-must-never-be-seen"
STALL_SECONDS = 1.5


@dataclass
class Fault:
    """What one request gets instead of an answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    stall: bool = False
    content: str | None = None
    """A well-formed response with this text."""


@dataclass
class Stub:
    """The server's address, what it was asked, and what it will do."""

    base_url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """Of the next requests, in order."""
    fault_of: Callable[[str], Fault | None] = lambda _: None
    """Of requests whose prompt it finds something in."""
    key: str | None = None
    """Anything else is refused with 401."""
    n_at_once: int = 0
    most_at_once: int = 0
    delay: float = 0.0


@contextlib.contextmanager
def serve() -> Iterator[Stub]:
    """The server, while the block runs."""
    stub = Stub()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.requests.append(body)
                stub.times.append(time.monotonic())
                stub.paths.append(self.path)
                fault = stub.faults.pop(0) if stub.faults else None
                stub.n_at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub.n_at_once)
            prompt = body["messages"][0]["content"]
            fault = fault or stub.fault_of(prompt)
            time.sleep(stub.delay)
            if stub.key is not None and self.headers.get("Authorization") != f"Bearer {stub.key}":
                fault = Fault(401, body=f"bad key {self.headers.get('Authorization')}".encode())
            if fault is not None and fault.stall:
                time.sleep(STALL_SECONDS)
            with lock:
                stub.n_at_once -= 1
            content = answer(prompt) if fault is None else fault.content
            data = completion(content) if content is not None else fault.body if fault else b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(fault.status if fault else 200)
                for name, value in (fault.headers if fault else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that had enough
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    stub.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str) -> bytes:
    """A response of the protocol."""
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"model": "stub-2026", "choices": [choice], "usage": usage}).encode()


def answer(prompt: str) -> str:
    """What the stub says to a prompt of ours."""
    if "Say OK" in prompt:
        return "OK"
    passages = [json.loads(text) for text in re.findall(r'^\d+\. (?:\([\d, ]+\) )?(".*")$', prompt, re.MULTILINE)]
    marks = re.search(r"between (\S+) and (\S+)", prompt)
    pattern = re.compile(f"{re.escape(marks[1])}(.*?){re.escape(marks[2].rstrip('.'))}", re.DOTALL) if marks else None
    if '{"explanation": <' in prompt:
        assert pattern
        pieces = Counter(piece.strip() for passage in passages for piece in pattern.findall(passage))
        return json.dumps({"explanation": f"the word {pieces.most_common(1)[0][0]}"})
    told = re.search(r'active on this: (".*")$', prompt, re.MULTILINE)
    assert told
    word = json.loads(told[1]).removeprefix("the word ")
    if pattern:
        answers = [any(word in piece for piece in pattern.findall(passage)) for passage in passages]
    else:
        answers = [word in passage for passage in passages]
    return json.dumps({"answers": [int(each) for each in answers]})
