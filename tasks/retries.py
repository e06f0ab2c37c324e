"""Which errors are worth a retry, and how long to wait."""

import logging
from typing import Any

from sae.errors import PipelineError
from tasks.process import is_stopping

logger = logging.getLogger(__name__)

NETWORK_ERRORS = (ConnectionError, TimeoutError)


def is_retryable(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: errors of the world outside may pass, a user's error never does.

    It is asked only while there are retries left.
    """
    if is_stopping():
        return False
    error = state.result(raise_on_failure=False)
    passing = error.retryable if isinstance(error, PipelineError) else isinstance(error, NETWORK_ERRORS)
    if passing:
        logger.warning("%s: %s; it will be tried again", getattr(task, "name", "task"), str(error).rstrip("."))
    return passing


def delays(first_seconds: float, n_retries: int) -> list[float]:
    """Seconds before each retry: doubled every time."""
    return [first_seconds * 2**attempt for attempt in range(n_retries)]
