"""Which latents are explained, by which model, from how many contexts."""

import re
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from sae.config import FrozenConfig, Ref, Spec
from sae.subject.config import HFModel, HFModelSpec

PROMPT_VERSION = 1
"""Of everything that is said to the model (`prompts.py`) and of how its answers are read. Bump it with either."""
KEY_NAME = r"^[A-Z][A-Z0-9_]*_(KEY|TOKEN)$"
"""Names of environment variables that may hold a key. A key itself does not look like this, so none gets into a
configuration by mistake; worker processes are told of changes to variables with these endings."""


class ChatEndpoint(FrozenConfig):
    """A server that speaks OpenAI's chat completions: a provider, or vLLM, llama.cpp, Ollama of one's own.

    Text of the corpus is sent there: the windows around firings and silent ones. Nothing else is: no names of
    documents, no places, no other settings.
    """

    kind: Literal["openai"] = "openai"
    base_url: str = Field(json_schema_extra={"pattern": "^https?://[^@?#]+$"})
    """Up to and with the version: `https://api.openai.com/v1`, `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """The model's name on that server."""
    api_key_env: str | None = Field(None, json_schema_extra={"pattern": KEY_NAME})
    """Name of the environment variable with the key, such as OPENAI_API_KEY. The key itself is written nowhere."""
    temperature: float | None = Field(0.0, ge=0, le=2)
    """None: not sent, for models that refuse it."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of an answer's tokens; newer models of OpenAI take the second name alone."""
    timeout_seconds: float = Field(120.0, gt=0, le=3600)
    """Of one request, its answer included."""
    n_retries: int = Field(5, ge=0, le=50)
    """Of one request after 429, 5xx, a lost connection, silence or an answer that is no JSON."""
    retry_delay_seconds: float = Field(1.0, ge=0, le=3600)
    """Before the first retry; doubled for each further one, or what the server's Retry-After says."""
    n_at_once: int = Field(4, gt=0, le=256)
    """Requests at the same time in one task; `execution.max_workers` tasks run at once."""

    # Not validators of the fields: their errors repeat the value, which may hold a secret.
    @model_validator(mode="after")
    def _no_secrets(self) -> "ChatEndpoint":
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("base_url: not an address of the form https://host[:port]/v1")
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise ValueError(
                "base_url: holds credentials, a query or a fragment. Leave the address alone; the key comes from the "
                "environment variable that api_key_env names"
            )
        if self.api_key_env is not None and not re.fullmatch(KEY_NAME, self.api_key_env):
            raise ValueError(
                "api_key_env: the NAME of an environment variable in capitals that ends in _KEY or _TOKEN, such as "
                "OPENAI_API_KEY; never the key itself"
            )
        return self


AnyExplainer = Annotated[ChatEndpoint | HFModel, Field(discriminator="kind")]


class ContextsConfig(FrozenConfig):
    """How many of a latent's contexts are shown to the explainer, and how many are held back for the scores."""

    n_top: int = Field(8, gt=0, le=100)
    """Strongest contexts shown."""
    n_shown_per_quarter: int = Field(1, ge=0, le=100)
    """Of each quarter of the firings, shown too: the strongest alone flatter."""
    n_scored_per_quarter: int = Field(4, gt=0, le=1000)
    """Of each quarter, held back: the contexts of the scores on which the latent fires."""
    n_misses: int = Field(5, ge=0, le=1000)
    """Near misses among the silent contexts of the detection score: the latent's top token, and it does not fire."""
    n_silent: int = Field(11, gt=0, le=1000)
    """Random contexts among them on which it does not fire. The defaults make as many silent as firing ones."""


class LabelsConfig(FrozenConfig):
    """Ask a model what latents stand for, and test what it says on contexts that it was not shown."""

    explainer: AnyExplainer
    n_latents: int = Field(100, gt=0, le=1_000_000)
    """Random live latents of every SAE, or all where it has fewer."""
    latents: tuple[int, ...] | None = None
    """These latents instead of random ones."""
    contexts: ContextsConfig = ContextsConfig()
    contexts_per_request: int = Field(8, gt=0, le=100)
    """Contexts that are judged in one request."""
    max_tokens: int = Field(400, gt=0, le=100_000)
    """Of one answer. Models that think before they answer need thousands."""

    @model_validator(mode="after")
    def _latents_are_distinct(self) -> "LabelsConfig":
        if self.latents is not None:
            if not self.latents:
                raise ValueError("latents: name at least one, or leave it out for random ones")
            for index, latent in enumerate(self.latents):
                if latent < 0:
                    raise ValueError(f"latents.{index}: {latent} is no latent's number")
                if latent in self.latents[:index]:
                    raise ValueError(f"latents.{index}: {latent} is there twice")
        return self


class QuestionsSpec(Spec):
    """What is shown and asked about the latents of one SAE: the same for every model that is asked."""

    stage: ClassVar[str] = "questions"
    code_version: ClassVar[int] = 1

    contexts: ContextsConfig
    n_latents: int | None
    """Random ones; None where they are named."""
    latents: tuple[int, ...] | None
    sae: Ref
    statistics: Ref
    tokens: tuple[Ref, ...]
    """One per segment, as in the statistics."""
    snapshot: Ref
    """Activations from which silent contexts are drawn: held-out ones where there are any."""
    window_tokens: int
    """As in the statistics."""
    seed: int


class EndpointModel(FrozenConfig):
    """What an endpoint's answers depend on, as far as its user decides it."""

    model: str
    temperature: float | None


class LabelsSpec(Spec):
    """One model's explanations of one SAE's latents, with their scores.

    Of an endpoint, the model's name and the settings of its answers are in the identity; `base_url`, `api_key_env`,
    time-outs and numbers of requests are not. They say where the model is asked and who pays, not what it is: an open
    model that moves to another server, or a key that is renewed, must not ask (and pay for) everything again. That a
    provider changes the model behind a name cannot be known beforehand, whatever is hashed; the name that the server
    gives itself in its answers is kept in labels.json for that reason. A local model is pinned as a subject is.
    """

    stage: ClassVar[str] = "labels"
    code_version: ClassVar[int] = PROMPT_VERSION

    questions: Ref
    explainer: EndpointModel | HFModelSpec
    contexts_per_request: int
    max_tokens: int
    seed: int

    @property
    def model_name(self) -> str:
        """The model as it was configured."""
        return self.explainer.model if isinstance(self.explainer, EndpointModel) else self.explainer.config.name
