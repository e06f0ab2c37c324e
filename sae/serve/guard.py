"""Who may ask: the page of this server in a browser on this machine, and programs that name it."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae.serve.refusals import Refused

MAX_OPEN = 2000
"""Requests at once, of any kind: bounds memory."""
HEADERS = {
    b"x-content-type-options": b"nosniff",
    # Data files are scripts: without this, any page could load them and read the report.
    b"cross-origin-resource-policy": b"same-origin",
}


class Guard:
    """Refuses requests for another host (DNS rebinding) or from another origin, and more than MAX_OPEN at once.

    Args:
        host: what the server listens on. On loopback only loopback names are this server's; elsewhere any address
            literal is, which cannot be rebound, and the name given.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host, self._n_open = app, host, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on with the headers that every answer has."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        self._n_open += 1
        try:
            self._check(Headers(scope=scope))
        except Refused as err:
            await JSONResponse(err.body, err.status, err.headers)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._n_open -= 1

    def _check(self, headers: Headers) -> None:
        if self._n_open > MAX_OPEN:
            raise Refused(503, f"{MAX_OPEN} requests are open", "server", "Try again", retry_after=1)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise Refused(403, "not a name of this server", "Host header", "Use the address that the server printed")
        origin = headers.get("origin")
        foreign = origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}")
        # A link from elsewhere to the report is a navigation; anything else from another site is not meant.
        navigates = headers.get("sec-fetch-mode", "navigate") == "navigate"
        if foreign or (headers.get("sec-fetch-site") == "cross-site" and not navigates):
            raise Refused(403, "sent by a page of another origin", "Origin header", "Open the page of this server")

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self._host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._host)


def is_loopback(host: str) -> bool:
    """Whether a host to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
