"""What may be asked of the API: JSON bodies with exact types, no unknown fields, and limits."""

from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sae.config import FrozenConfig
from sae.serve.refusals import Refused

MAX_BODY_BYTES = 64 << 10
MAX_TOP = 64
"""Latents listed per token."""
MAX_NEW_TOKENS = 256
MAX_INTERVENTIONS = 16
MAX_STRENGTH = 1e6
"""Of a clamp or a scale: far beyond any activation, and far from the end of float32."""
MAX_SEED = (1 << 63) - 1


Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]
Latent = Annotated[int, Field(ge=0, lt=1 << 31)]


class TextLatents(FrozenConfig):
    """POST api/latents: the strongest latents on every token."""

    text: str = Field(min_length=1)
    sae: str
    top: int = Field(8, ge=1, le=MAX_TOP)


class TextLatent(FrozenConfig):
    """POST api/latent: one latent's activation on every token."""

    text: str = Field(min_length=1)
    sae: str
    latent: Latent


class Intervention(FrozenConfig):
    """What is done to one latent: f' = value (clamp), value * f (scale) or 0 (ablate)."""

    latent: Latent
    mode: Literal["clamp", "scale", "ablate"]
    value: Strength | None = None

    @model_validator(mode="after")
    def _value_fits(self) -> "Intervention":
        if (self.value is None) != (self.mode == "ablate"):
            raise ValueError("clamp and scale need a value, ablate takes none")
        return self


class Generation(FrozenConfig):
    """POST api/generate: text with and without interventions."""

    prompt: str
    sae: str
    n_tokens: int = Field(24, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0, ge=0, le=10, allow_inf_nan=False)
    """0: always the likeliest token."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    interventions: tuple[Intervention, ...] = Field(min_length=1, max_length=MAX_INTERVENTIONS)

    @model_validator(mode="after")
    def _each_latent_once(self) -> "Generation":
        latents = [each.latent for each in self.interventions]
        if len(set(latents)) < len(latents):
            raise ValueError("a latent has more than one intervention")
        return self


Body = TypeVar("Body", TextLatents, TextLatent, Generation)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """A request's body. Raises: Refused (400) when it is no JSON, (422) when it is not what the call takes."""
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as err:
        first: ErrorDetails = err.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, first["msg"], "body", "Send one JSON object in UTF-8") from err
        where = ".".join(["body", *map(_shown_key, first["loc"])])
        fields = ", ".join(kind.model_fields)
        what = first["msg"].removeprefix("Value error, ")
        raise Refused(422, what, where, f"The fields are {fields}; see api/info for the limits") from err


def _shown_key(key: str | int) -> str:
    """A key of the client's, cut: it may be as long as the body."""
    return str(key)[:60].encode("ascii", "backslashreplace").decode()
