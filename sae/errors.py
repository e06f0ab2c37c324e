"""The error family. Each message says what was wrong, where, and what to do.

PipelineError
├── ConfigError     the configuration is wrong: an unknown key, a value out of range, settings that do not fit
├── InputError      what the configuration names is wrong: an unreadable corpus, a hook point the model lacks,
│                   activations with NaN
├── StoreError      stored data is missing, damaged, or not what its record says
│   └── DamagedError    one artefact's bytes are; computing it again restores them
├── TrainingError   training cannot go on: a loss that is not finite, data without variance
└── TransientError  the world outside failed (storage, network, a lost child process); worth a retry
    └── StopRequested   the process was asked to stop; what was done is saved
"""

from typing import ClassVar


class PipelineError(Exception):
    """Base of every error raised on purpose. `retryable` says whether the same call may succeed later."""

    retryable: ClassVar[bool] = False


class ConfigError(PipelineError):
    """The configuration is wrong. Raised before work starts."""


class InputError(PipelineError):
    """Something the configuration points at (a corpus, a model, given activations) cannot be used."""


class StoreError(PipelineError):
    """A stored artefact is missing, damaged, or differs from its commit record."""


class DamagedError(StoreError):
    """The bytes of one artefact, or of one part of it, are missing or not what its commit record says.

    The message names the file and, for activations, row group and offset. Computing the artefact again restores it.
    """

    def __init__(self, message: str, ref: str, part: int | None = None) -> None:
        super().__init__(message)
        self.ref, self.part = ref, part

    def __reduce__(self) -> tuple[type["DamagedError"], tuple[str, str, int | None]]:
        # Errors cross processes, and by default only the message would.
        return type(self), (str(self), self.ref, self.part)


class TrainingError(PipelineError):
    """Training cannot go on."""


class TransientError(PipelineError):
    """Storage, the network or a child process failed. The same call may succeed later."""

    retryable = True


class StopRequested(TransientError):
    """The process was asked to stop (SIGTERM). Raised by progress callbacks; long work saves a checkpoint and ends."""
