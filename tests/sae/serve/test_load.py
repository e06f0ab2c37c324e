"""A thousand clients at once."""

import asyncio
import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

N_CLIENTS = 1000
MAX_GROWTH_KB = 150 << 10


class Reply(NamedTuple):
    status: int
    headers: bytes
    body: bytes


def peak_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


async def exchange(host: str, port: int, request: bytes) -> Reply:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return Reply(int(head.split()[1]), head.lower(), body)
    finally:
        writer.close()
        await writer.wait_closed()


def test_a_thousand_requests_at_once_are_all_answered(server: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    at = urlsplit(server.url)
    assert at.hostname
    assert at.port
    host, port = at.hostname, at.port

    def post(number: int) -> bytes:
        intervention = {"latent": number % 64, "mode": "clamp", "value": 5.0}
        calls = [
            ("latents", {"text": f"text {number}", "sae": "live"}),
            ("generate", {"prompt": f"{number}", "sae": "live", "n_tokens": 8, "interventions": [intervention]}),
            ("latent", {"text": f"text {number}", "sae": "live", "latent": number % 64}),
        ]
        call, fields = calls[number % len(calls)]
        body = json.dumps(fields).encode()
        head = f"POST /api/{call} HTTP/1.1\r\nHost: {at.netloc}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    page = f"GET / HTTP/1.1\r\nHost: {at.netloc}\r\nConnection: close\r\n\r\n".encode()

    async def load() -> tuple[list[Reply], list[Reply]]:
        posts = [exchange(host, port, post(number)) for number in range(N_CLIENTS)]
        pages = [exchange(host, port, page) for _ in range(20)]
        found = await asyncio.wait_for(asyncio.gather(*posts, *pages), 60)
        return found[:N_CLIENTS], found[N_CLIENTS:]

    before = peak_kb(server.process.pid)
    replies, pages = asyncio.run(load())
    for reply in replies:
        assert reply.status in (200, 503)
        assert b"content-type: application/json" in reply.headers
        found = json.loads(reply.body)
        assert ("error" in found) == (reply.status == 503)
        assert (b"retry-after: 1" in reply.headers) == (reply.status == 503)
    assert Counter(reply.status for reply in replies)[200] > 30
    assert all(reply.status == 200 and reply.body.rstrip().endswith(b"</html>") for reply in pages)
    assert peak_kb(server.process.pid) - before < MAX_GROWTH_KB
    assert server.process.poll() is None
    assert server.post("latents", text="still there", sae="live").status == 200
