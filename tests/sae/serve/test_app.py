"""The server as a program meets it: files, refusals, and what it does when too much is asked."""

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import xxhash

from sae.serve.app import describe
from sae.serve.live import NO_MODEL, load_live
from sae.serve.work import Work

JSON = "application/json"
GENERATE = {"prompt": "a", "sae": "live", "interventions": [{"latent": 1, "mode": "ablate"}]}
NAN = b'{"prompt":"a","sae":"live","interventions":[{"latent":1,"mode":"clamp","value":%s}]}'


def test_every_file_of_the_report_is_served_as_it_is(server: Any, served: Any) -> None:
    types = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".json": JSON}
    types |= {".css": "text/css; charset=utf-8", ".parquet": "application/vnd.apache.parquet"}
    for entry in served.record.files:
        found = server.ask("GET", f"/{entry.name}")
        assert (found.status, xxhash.xxh3_64_hexdigest(found.body)) == (200, entry.xxh3)
        assert found.headers["content-type"] == types.get(Path(entry.name).suffix, "text/markdown; charset=utf-8")
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["cross-origin-resource-policy"] == "same-origin"
        assert ("immutable" in found.headers["cache-control"]) == entry.name.startswith("assets/")
        again = server.ask("GET", f"/{entry.name}", if_none_match=f'W/"x", {found.headers["etag"]}')
        assert (again.status, again.body) == (304, b"")
        head = server.ask("HEAD", f"/{entry.name}")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(entry.n_bytes))
    assert server.ask("GET", "/").body == server.ask("GET", "/index.html").body


@pytest.mark.parametrize(
    "path",
    [
        *("/../record.json", "/%2e%2e/record.json", "/..%2frecord.json", "/data/../../record.json", "//etc/passwd"),
        *(
            "/%2fetc%2fpasswd",
            "/....//record.json",
            "/assets/..%5c..%5crecord.json",
            "/index.html%00.js",
            "/data",
            "/api",
        ),
    ],
)
def test_no_path_leaves_the_report(server: Any, path: str) -> None:
    found = server.ask("GET", path)
    assert found.status == 404
    assert found.json["error"]["where"] == "path"


def test_info_says_what_is_live_and_why_not(server: Any, served: Any) -> None:
    info = server.ask("GET", "/api/info").json
    assert info["live"]
    assert info["saes"]["given"] == {"live": False, "why": NO_MODEL}
    live = info["saes"]["live"]
    assert (live["n_latents"], live["max_tokens"], live["generates"]) == (64, 16, True)
    assert info["limits"]["body_bytes"] == 64 << 10
    refused = server.post("latents", text="a", sae="given")
    assert refused.status == 409
    assert refused.json["error"]["what"] == NO_MODEL


def test_a_model_that_cannot_be_loaded_leaves_the_files(served: Any, tmp_path: Path) -> None:
    broken = served.record.model_copy(update={"spec": json.loads(json.dumps(served.record.spec))})
    broken.spec["saes"][0]["sae"] = "saes/" + "f" * 16
    live = load_live(served.storage, broken)
    assert not live.saes
    assert "never finished" in live.why_not["live"]
    assert describe(live, Work())["live"] is False


@pytest.mark.parametrize(
    ("call", "fields", "status", "where"),
    [
        ("latents", {"sae": "live"}, 422, "body.text"),
        ("latents", {"text": "a"}, 422, "body.sae"),
        ("latents", {"text": "", "sae": "live"}, 422, "body.text"),
        ("latents", {"text": 1, "sae": "live"}, 422, "body.text"),
        ("latents", {"text": "a", "sae": "live", "top": "8"}, 422, "body.top"),
        ("latents", {"text": "a", "sae": "live", "top": 0}, 422, "body.top"),
        ("latents", {"text": "a", "sae": "live", "more": 1}, 422, "body.more"),
        ("latents", {"text": "a", "sae": "other"}, 404, "body.sae"),
        ("latents", {"text": "x" * 16, "sae": "live"}, 422, "body.text"),
        ("latents", {"text": "\ud800", "sae": "live"}, 400, "body"),
        ("latent", {"text": "a", "sae": "live", "latent": 64}, 404, "body.latent"),
        ("latent", {"text": "a", "sae": "live", "latent": -1}, 422, "body.latent"),
        ("latent", {"text": "a", "sae": "live", "latent": 1.5}, 422, "body.latent"),
        ("latent", {"text": "a", "sae": "live", "latent": 10**400}, 422, "body.latent"),
        ("generate", GENERATE | {"n_tokens": 257}, 422, "body.n_tokens"),
        ("generate", GENERATE | {"n_tokens": True}, 422, "body.n_tokens"),
        ("generate", GENERATE | {"temperature": -1}, 422, "body.temperature"),
        ("generate", GENERATE | {"seed": -1}, 422, "body.seed"),
        ("generate", GENERATE | {"interventions": []}, 422, "body.interventions"),
        ("generate", GENERATE | {"interventions": [{"latent": 1, "mode": "clamp"}]}, 422, "body.interventions.0"),
        ("generate", GENERATE | {"interventions": [{"latent": 1, "mode": "x"}]}, 422, "body.interventions.0.mode"),
        ("generate", GENERATE | {"interventions": GENERATE["interventions"] * 2}, 422, "body"),
        (
            "generate",
            GENERATE | {"interventions": [{"latent": 64, "mode": "ablate"}]},
            404,
            "body.interventions.0.latent",
        ),
        (
            "generate",
            GENERATE | {"interventions": [{"latent": 1, "mode": "clamp", "value": 1e7}]},
            422,
            "body.interventions.0.value",
        ),
    ],
)
def test_wrong_fields_are_named(server: Any, call: str, fields: dict[str, Any], status: int, where: str) -> None:
    found = server.post(call, **fields)
    assert found.status == status
    assert found.json["error"]["where"] == where


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 422),
        (b"[]", 422),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (NAN % b"NaN", 422),
        (NAN % b"Infinity", 422),
        (NAN % b"1e999", 422),
        (b" " * (65 << 10), 413),
    ],
    ids=["empty", "half", "null", "list", "not UTF-8", "deep", "NaN", "infinity", "too large a number", "too long"],
)
def test_malformed_bodies_are_refused(server: Any, body: bytes, status: int) -> None:
    found = server.ask("POST", "/api/generate", body, content_type=JSON)
    assert found.status == status
    assert found.json["error"]["what"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/latents", {}, 405),
        ("PUT", "/api/generate", {}, 405),
        ("POST", "/index.html", {}, 405),
        ("POST", "/api/unknown", {}, 404),
        ("POST", "/api/latents", {"content_type": "text/plain"}, 415),
        ("POST", "/api/latents", {"content_type": JSON, "content_length": "99999999"}, 413),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/api/info", {"host": "127.0.0.1.evil.example:80"}, 403),
        ("GET", "/api/info", {"host": "10.0.0.1"}, 403),
        ("GET", "/api/info", {"host": ""}, 403),
        ("GET", "/api/info", {"host": "[::1"}, 403),
        ("GET", "/api/info", {"origin": "http://evil.example"}, 403),
        ("GET", "/api/info", {"origin": "null"}, 403),
        ("GET", "/data/live/col/max.js", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ("GET", "/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ("GET", "/api/info", {"host": "localhost:1234", "origin": "http://localhost:1234"}, 200),
        ("GET", "/api/info", {"host": "[::1]:1234"}, 200),
    ],
)
def test_only_the_servers_own_page_may_ask(
    server: Any, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    found = server.ask(method, path, **headers)
    assert found.status == status
    if status != 200:
        assert found.json["error"]["do"]
    if status == 405:
        assert found.headers["allow"]


def test_clients_that_go_away_leave_room_for_others(server: Any) -> None:
    at = urlsplit(server.url)
    body = json.dumps(GENERATE | {"n_tokens": 15}).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}"
    for _ in range(200):
        with socket.create_connection((at.hostname, at.port)) as gone:
            gone.sendall(f"{head}\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 10
    while (found := server.post("generate", **GENERATE)).status == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.status == 200
