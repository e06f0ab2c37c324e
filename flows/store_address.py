"""What the commands on a store are told: roots, and addresses of artefacts in them."""

from pathlib import Path
from typing import TYPE_CHECKING

from sae.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from sae.store.storage.filesystem import Storage
    from sae.store.upkeep.verify import Target


def parse_address(text: str) -> "tuple[str, str, int | None] | None":
    """Root (may be empty), address and part that a text names; None when it names no artefact."""
    from flows.show import ADDRESS

    match = ADDRESS.match(text)
    return (match["root"], match["ref"], int(match["part"]) if match["part"] else None) if match else None


def read_targets(root: str | None, refs: list[str]) -> "tuple[str | None, list[Target]]":
    """The root (None: nobody names one), and what the addresses name in it; an address may begin with its root.

    Raises: ConfigError when one is no address, or they name several roots.
    """
    from sae.store.storage.filesystem import Storage
    from sae.store.upkeep.verify import Target

    found, roots = [], {Storage(root).root: root} if root else {}
    for text in refs:
        address = parse_address(text)
        if address is None:
            raise ConfigError(
                f"{text}: not an artefact's address. Write stage/fingerprint, as `sae-pipeline store info` lists them."
            )
        if address[0]:
            roots[Storage(address[0]).root] = address[0]
        found.append(Target(address[1], address[2]))
    if len(roots) > 1:
        raise ConfigError(f"several roots: {', '.join(roots.values())}. Give one.")
    return next(iter(roots.values()), None), found


def records_of(storage: "Storage", named: "list[Target]") -> "list[Target]":
    """Every commit record of some artefacts. Raises: StoreError when one has none."""
    from sae.store.upkeep.verify import targets_of

    found: list[Target] = []
    for target in named:
        mine = targets_of(storage, target.ref) if target.part is None else [target]
        if not mine:
            raise StoreError(f"{storage.uri(target.ref)}: not there, or never finished. Nothing to verify.")
        found += mine
    return list(dict.fromkeys(found))


def open_root(root: str) -> "Storage":
    """The root. Raises: ConfigError when there is none."""
    from sae.store.storage.filesystem import Storage

    storage = Storage(root)
    if storage.is_local and not Path(storage.full("")).is_dir():
        raise ConfigError(f"root {root!r}: no such folder. Choose another with --root.")
    return storage
