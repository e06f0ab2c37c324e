"""Whether a Ray cluster keeps strangers out, and lets this process in. Asked before Ray is told to connect.

Who reaches a cluster that asks for no token runs any code on all its machines, and Ray's servers listen on every
address of theirs, whichever is given. So such a cluster is not used, not even at a loopback address.
"""

import os
from pathlib import Path

from sae.errors import ConfigError, TransientError

ANSWER_SECONDS = 10.0
METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Of the cluster's head, with an empty request."""
HOW = (
    "Run `ray get-auth-token --generate` once, bring ~/.ray/auth_token to every machine, and start Ray everywhere with "
    "RAY_AUTH_MODE=token in the environment (docs/ray.md)."
)


def check_door(address: str) -> None:
    """Knock at a cluster's head without a token, and then with it.

    Raises:
        ConfigError: it answers who has no token, or this process has none, or a wrong one.
        TransientError: nobody answers.
    """
    if _lets_in(address, None):
        raise ConfigError(
            f"execution.ray.address: the Ray cluster at {address} asks for no token, so whoever reaches it can run "
            f"anything there. {HOW}"
        )
    token = _own_token()
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token" or not token:
        raise ConfigError(
            f"execution.ray.address: the Ray cluster at {address} asks for a token, and this process has none "
            f"(RAY_AUTH_MODE={mode}; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). {HOW}"
        )
    if not _lets_in(address, token):
        raise ConfigError(
            f"execution.ray.address: the Ray cluster at {address} does not take the token of this process. Bring "
            f"~/.ray/auth_token from its head."
        )


def _own_token() -> str | None:
    """Where Ray looks for it, in this order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def _lets_in(address: str, token: str | None) -> bool:
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            channel.unary_unary(METHOD)(b"", timeout=ANSWER_SECONDS, metadata=metadata)
        except grpc.RpcError as err:
            if err.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise TransientError(
                f"execution.ray.address: no Ray cluster answers at {address} "
                f"({err.code().name.lower()}: {err.details()})"
            ) from err
    return True
