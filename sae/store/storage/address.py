"""The address of a root: which protocols can be used, and what must not stand in one."""

import re

from sae.errors import ConfigError

PROTOCOLS = ("file", "s3", "memory")


def protocol_of(root: str) -> str:
    """The protocol of a root. Raises: ConfigError when it cannot be used; no credentials are repeated in it."""
    if "://" not in root:
        if slip := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", root):
            raise ConfigError(f"root {slip[0]}...: an address begins with {slip[1].lower()}:// (two slashes)")
        return "file"
    protocol, rest = root.split("://", 1)
    protocol = protocol.lower()
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"root {protocol}://...: {protocol}:// has no exclusive create here, so a crash or a second run could "
            f"corrupt stored data. Use a local folder, s3:// or (in one process) memory://."
        )
    if protocol == "s3":
        bucket = rest.split("/", 1)[0]
        if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")) or "?" in rest:
            raise ConfigError(
                "root s3://...: an address holds a bucket and a prefix, never credentials or options (they would "
                "end up in records and logs). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and "
                "AWS_ENDPOINT_URL, in the environment."
            )
        if not bucket:
            raise ConfigError("root s3://...: it names no bucket. Write s3://bucket/prefix.")
    return protocol
