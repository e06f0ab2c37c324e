"""Frozen, strict configs and the identities made from them.

A config is a pydantic model that cannot change and refuses unknown keys. A *spec* is what one stage needs to produce
one artefact: its config section, the addresses of its inputs and the seed. The digest of a spec is the artefact's
name in the store, so identities are known before anything runs.
"""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

FINGERPRINT_CHARS = 16

Ref = Annotated[str, Field(pattern=r"^[a-z]+/[0-9a-f]{16}$")]
"""The address of an artefact inside a root: `stage/fingerprint`."""
DeviceChoice = Literal["auto", "cpu", "cuda"]
"""auto: a GPU where the process that computes sees one that works, else the CPU."""


class FrozenConfig(BaseModel):
    """A config section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        # A form made from the schema shows the names that a config has.
        field_title_generator=lambda name, _: name,
    )


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, cut to 64 bits in hex: 16 characters.

    At a million artefacts a chance collision has probability 3e-8.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_CHARS]


class Spec(FrozenConfig):
    """Everything that decides the content of one artefact, and nothing else.

    Subclasses name their `stage` (the folder) and `code_version`: a number bumped by hand when the same spec would
    give another result. Where it runs, how often it was tried and with how many threads is not part of a spec.
    """

    stage: ClassVar[str]
    code_version: ClassVar[int]
    parts_at_once: ClassVar[bool] = False
    """Whether all parts of the artefact are made together with it, in one task."""

    @property
    def fingerprint(self) -> str:
        """The artefact's name: a digest of stage, code version and content."""
        return digest([self.stage, self.code_version, self.model_dump(mode="json")])

    @property
    def ref(self) -> str:
        """`stage/fingerprint`: how other specs name this artefact."""
        return f"{self.stage}/{self.fingerprint}"

    @property
    def inputs(self) -> dict[str, str]:
        """Role -> address of every artefact this one is made from, for lineage. `Ref` fields, in order."""
        found: dict[str, str] = {}
        for name, value in self:
            if _is_ref(value):
                found[name] = value
            elif isinstance(value, tuple):
                found |= {f"{name}[{i}]": item for i, item in enumerate(value) if _is_ref(item)}
        return found


def _is_ref(value: Any) -> bool:
    if not isinstance(value, str) or value.count("/") != 1:
        return False
    fingerprint = value.partition("/")[2]
    return len(fingerprint) == FINGERPRINT_CHARS and all(c in "0123456789abcdef" for c in fingerprint)
