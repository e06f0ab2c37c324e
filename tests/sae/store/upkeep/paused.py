"""A writer or a collector as a process that stops in the middle until a line comes on stdin.

`paused.py writer|collector ROOT LEASE_SECONDS` says "stopped" there and "done" at its end;
`paused.py writers|collectors ROOT LEASE_SECONDS` go on without a stop, until they have written everything, or a line
comes on stdin.
"""

import select
import sys
from typing import Any

from sae.store import layout
from sae.store.artefacts import claims
from sae.store.storage.filesystem import Storage
from sae.store.upkeep.collect import delete_garbage, find_garbage
from tests.sae.store.things import ThingSpec, make

N_WRITTEN = 12


def main() -> None:
    role, root, lease = sys.argv[1:]
    claims.LEASE_SECONDS = float(lease)
    storage = Storage(root)
    if role == "writer":
        stop_once(storage, "create_exclusive")
        write(storage, 1)
    elif role == "collector":
        stop_once(storage, "remove")
        collect(storage)
    elif role == "writers":
        for size in range(N_WRITTEN):
            write(storage, size)
    else:
        while not select.select([sys.stdin], [], [], 0)[0]:
            collect(storage)
    print("done", flush=True)


def write(storage: Storage, size: int) -> None:
    """The same files whoever writes them."""
    make(storage, ThingSpec(size=size), {"a": b"x" * 1000, "sub/b": b"%d" % size})


def collect(storage: Storage) -> None:
    """Whatever nobody owns, however young."""
    for found in list(find_garbage(storage, grace_seconds=0)):
        delete_garbage(storage, found)


def stop_once(storage: Storage, name: str) -> None:
    """Stop before the first call of this method, a probe's or a note's aside."""
    method = getattr(storage, name)

    def call(path: str, *arguments: Any) -> Any:
        if not path.startswith(layout.STAGING) and layout.COLLECTED not in path:
            setattr(storage, name, method)
            print("stopped", flush=True)
            sys.stdin.readline()
        return method(path, *arguments)

    setattr(storage, name, call)


if __name__ == "__main__":
    main()
