"""A remote shell whose connection dies with the network, as that of ssh with ServerAliveInterval on both sides does.

`remote_shell.py serve ADDRESS PARENT_PID` runs what it is asked to, in its own environment.
`remote_shell.py on ADDRESS COMMAND...` runs a command there, with stdin and stdout passed through. It ends with status
0 when the command has ended, with 255 when the connection is lost; the command's stdin ends then.
"""

import contextlib
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading

from tasks.tied import tie_to

PORT = 2222
ALIVE_SECONDS = 5
"""Without an answer a connection is lost after so long."""
ON = (sys.executable, "-P", "-m", "tests.bad_days.remote_shell", "on")


def keep_alive(connection: socket.socket) -> None:
    """Notice a peer that is not there any more, whether anything is being sent to it or not."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * ALIVE_SECONDS)


class _Session(socketserver.StreamRequestHandler):
    """One command."""

    def handle(self) -> None:
        keep_alive(self.connection)
        command = json.loads(self.rfile.readline())
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout
            back = threading.Thread(target=self._send_output, args=(process.stdout.fileno(),))
            back.start()
            assert process.stdin
            with contextlib.suppress(OSError), process.stdin:  # closed when the connection is lost, too
                while block := self.rfile.read1(1 << 16):
                    process.stdin.write(block)
            back.join()

    def _send_output(self, output: int) -> None:
        connected = True
        while block := os.read(output, 1 << 16):
            try:
                if connected:
                    self.connection.sendall(block)
            except OSError:  # it is read on, so that the command can end
                connected = False
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


def serve(address: str, parent: int) -> None:
    """Until the parent dies."""
    tie_to(parent)
    with _Server((address, PORT), _Session) as server:
        print("serving", flush=True)
        server.serve_forever()


def run_on(address: str, command: list[str]) -> int:
    """Returns: the exit status."""
    try:
        connection = socket.create_connection((address, PORT), timeout=ALIVE_SECONDS)
        connection.settimeout(None)
        keep_alive(connection)
        connection.sendall(json.dumps(command).encode() + b"\n")
        threading.Thread(target=_send_input, args=(connection,), daemon=True).start()
        while block := connection.recv(1 << 16):
            os.write(1, block)
    except OSError as err:
        print(f"remote shell on {address}: {err}", file=sys.stderr)
        return 255
    return 0


def _send_input(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := os.read(0, 1 << 16):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        os._exit(run_on(sys.argv[2], sys.argv[3:]))
