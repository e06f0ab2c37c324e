"""`sae-pipeline serve` as a command: how it starts, what it refuses, how it ends."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flows.cli import main
from sae.plan import PipelineConfig

ROOT = Path(__file__).parents[2]


def start(root: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "flows.cli", "serve", root, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("report: http://127.0.0.1:"), process.communicate()
    return process, str(urlsplit(line.split()[1]).netloc)


def post(address: str, call: str, **fields: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("POST", f"/api/{call}", json.dumps(fields), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_finished_run_is_served_and_a_signal_ends_it_cleanly(finished: PipelineConfig, number: int) -> None:
    process, address = start(finished.execution.root)
    with process:
        try:
            key = "topk-64-k4"
            status, found = post(address, "latents", text="import alpha", sae=key)
            assert status == 200, found
            assert all(token["n"] <= 4 for token in found["tokens"])
            answers: list[tuple[int, Any]] = []
            asked = {"prompt": "alpha", "sae": key, "interventions": [{"latent": 1, "mode": "ablate"}]}
            clients = [
                threading.Thread(target=lambda: answers.append(post(address, "generate", **asked))) for _ in range(8)
            ]
            for client in clients:
                client.start()
            # All have been accepted once a later request is answered.
            post(address, "latents", text="beta", sae=key)
            process.send_signal(number)
            for client in clients:
                client.join(20)
            assert process.wait(20) == 0
            assert process.stderr
            assert process.stderr.read().splitlines()[-1] == "stopped"
            assert {status for status, _ in answers} <= {200, 503}
            assert len(answers) == 8
        finally:
            process.kill()


def test_what_cannot_be_served_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "no report there" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["in use", "99999"])
def test_a_port_that_cannot_be_used_is_one_line(
    finished: PipelineConfig, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1]) if port == "in use" else port
        assert main(["serve", finished.execution.root, "--port", number]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert f"cannot listen on 127.0.0.1:{number}" in errors[0]
    assert "--port" in errors[0]
