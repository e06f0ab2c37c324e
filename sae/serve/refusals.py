"""Answers other than 200: a status and what, where, what to do, as JSON."""

from sae.errors import PipelineError


class Refused(PipelineError):
    """A request that is not answered as asked.

    Args:
        status: of the HTTP answer.
        what: what is wrong.
        where: the field, path or header that is.
        do: what the client can do about it.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, what: str, where: str, do: str, retry_after: int | None = None) -> None:
        super().__init__(f"{where}: {what}. {do}.")
        self.status, self.what, self.where, self.do, self.retry_after = status, what, where, do, retry_after

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """The JSON of the answer."""
        return {"error": {"what": self.what, "where": self.where, "do": self.do}}

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's head says beside its status."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
