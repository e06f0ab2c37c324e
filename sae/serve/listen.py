"""The server process: a socket, uvicorn, and a clean end."""

import resource
import socket

import uvicorn

from sae.errors import ConfigError
from sae.serve.app import make_app
from sae.serve.live import Live
from sae.serve.site import Site
from sae.serve.work import Work

BACKLOG = 2048
"""Connections that the system accepts before the server has looked at them."""
MAX_PORT = 65_535
OPEN_FILES = 8192
"""Connections are files, and a shell's usual limit is 1,024."""
GRACE_SECONDS = 5
"""For open requests to be answered after the server was asked to stop."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on host and port; port 0 is any free one.

    Raises: ConfigError when the address cannot be used.
    """
    if not 0 <= port <= MAX_PORT:  # getaddrinfo would take the remainder
        raise ConfigError(f"cannot listen on {host}:{port}: a --port is a number from 0 (any free one) to {MAX_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}. Choose another --port (0: any free one) or --host."
        ) from err
    return listening


def run_server(listening: socket.socket, host: str, site: Site, live: Live) -> None:
    """Serve until SIGINT or SIGTERM; open requests are answered, waiting ones refused.

    Raises: KeyboardInterrupt, or what the caller's signal handlers raise, once the server has stopped.
    """
    _allow_open_files()
    work = Work()
    config = uvicorn.Config(
        make_app(site, live, work, host),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_SECONDS,
        proxy_headers=False,
    )
    _Server(config, work).run(sockets=[listening])


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn's, which tells the work to end before it waits for open requests."""

    def __init__(self, config: uvicorn.Config, work: Work) -> None:
        super().__init__(config)
        self._work = work

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._work.stop()
        await super().shutdown(sockets)
