"""Random numbers that are keyed by what they are for."""

import hashlib
import json

import numpy as np


def philox(purpose: str, *key: str | int) -> np.random.Generator:
    """A generator keyed by what the numbers are for. Equal keys give equal streams on every machine."""
    key_bytes = hashlib.sha256(json.dumps([purpose, *key]).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key_bytes, "little")))
