"""Children that are killed, or live at another time: processes forked off one that has loaded everything.

`python -m tests.bad_days.children` reads a request a line from stdin, does it in a child, and says in two lines which
process that is and how it ended. A child's every system call can be a step at which it is killed (ptrace).
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae.errors import PipelineError
from sae.store.storage import http_ranges, signed_get
from sae.store.storage.filesystem import Storage
from sae.store.storage.staging import remove_abandoned
from sae.store.upkeep.collect import delete_garbage, find_garbage
from tests.bad_days import small_store

TRACE_ME, SYSCALL, SET_OPTIONS = 0, 24, 0x4200
TRACE_SYS_GOOD, EXIT_KILL = 1, 1 << 20
AT_SYSCALL = signal.SIGTRAP | 0x80
SMALLEST_PIECE = 5 << 20


class End(NamedTuple):
    """How a child ended."""

    signal: int
    """That killed it; 0: none."""
    said: str
    """What its work returned, or `Kind: message` of a PipelineError."""
    steps: int
    """System calls that it began, as far as they were counted."""


class Children:
    """Starts one child at a time."""

    def __init__(self) -> None:
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.bad_days.children"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, work: str, root: str, *arguments: Any, **how: Any) -> int:
        """Begin a child. Arguments of the work and `how` (`die_at`, `clock`, `at`, `environment`): see `_work`.

        Returns: its process id.
        """
        assert self._host.stdin
        # The host began in another environment, perhaps, than the one that knows the endpoint.
        ours = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environment = ours | how.pop("environment", {})
        request = {"work": work, "root": root, "arguments": arguments, "environment": environment} | how
        self._host.stdin.write(json.dumps(request) + "\n")
        self._host.stdin.flush()
        return int(self._answer())

    def end(self) -> End:
        """Wait for the child."""
        return End(*self._answer())

    def run(self, work: str, root: str, *arguments: Any, **how: Any) -> End:
        """Start a child and wait for it."""
        self.start(work, root, *arguments, **how)
        return self.end()

    def close(self) -> None:
        """End the host and the child with it."""
        self._host.kill()
        self._host.communicate()

    def _answer(self) -> Any:
        assert self._host.stdout
        line = self._host.stdout.readline()
        assert line, "the process that starts children has died"
        return json.loads(line)


@contextlib.contextmanager
def children() -> Iterator[Children]:
    """A host of children while the block runs."""
    hosts = Children()
    try:
        yield hosts
    finally:
        hosts.close()


def may_trace() -> bool:
    """Whether this system lets a process step through its child."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", _ASK], os.environ)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_ASK = "import ctypes, sys; sys.exit(sys.platform != 'linux' or ctypes.CDLL(None).ptrace(0, 0, None, None) != 0)"


# What a child can do.


def _collect(storage: Storage, grace_seconds: float) -> list[str]:
    """Returns: what was deleted."""
    found = list(find_garbage(storage, grace_seconds))
    return [each.path for each in found if delete_garbage(storage, each)]


def _clean_staging(storage: Storage, parent: str) -> None:
    remove_abandoned(Path(parent))


def _write_in_pieces(storage: Storage) -> None:
    from sae.store.storage import s3

    s3.UPLOAD_BYTES = SMALLEST_PIECE
    small_store.write_big(storage)


def _build_and_read(storage: Storage) -> list[Any]:
    """Returns: a digest of the rows, and how often the work was tried again."""
    import xxhash

    (rows, damage), failures = small_store.patiently(lambda: small_store.build_and_read(storage))
    assert damage == []
    return [xxhash.xxh3_64_hexdigest(rows), failures]


def _extract(storage: Storage, folder: str) -> int:
    """Returns: how often the work was tried again."""
    from tests.bad_days.tiny_model import extract

    return small_store.patiently(lambda: extract(storage, Path(folder)))[1]


def _write_and_wait(storage: Storage, part: int, go_on: str) -> None:
    """Stop between files and record: says so by a file, and waits for another."""
    create = storage.create_exclusive

    def call(path: str, data: bytes) -> bool:
        Path(go_on).with_suffix(".stopped").touch()
        while not Path(go_on).exists():
            time.sleep(0.01)
        return create(path, data)

    storage.create_exclusive = call  # type: ignore[method-assign]
    small_store.write(storage, part)


WORKS: dict[str, Callable[..., Any]] = {
    "part": small_store.write,
    "plan": small_store.write_plan,
    "snapshot": small_store.write_snapshot,
    "build": small_store.build,
    "build and read": _build_and_read,
    "big file": _write_in_pieces,
    "collect": _collect,
    "clean staging": _clean_staging,
    "extract": _extract,
    "part, with a stop": _write_and_wait,
}


# The process that starts them.


def main() -> None:
    logging.disable(logging.WARNING)  # every repair is one
    # Once here, so that a child does nothing for the first time: no imports, no question to git or the packages.
    with tempfile.TemporaryDirectory() as folder:
        small_store.build(Storage(folder))
    while line := sys.stdin.readline():
        request = json.loads(line)
        die_at = request.get("die_at")
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reading)
            _work(writing, **request)
        os.close(writing)
        if die_at is not None:
            os.waitpid(pid, 0)  # it stops before it works
            _libc().ptrace(SET_OPTIONS, pid, None, TRACE_SYS_GOOD | EXIT_KILL)
        print(pid, flush=True)
        steps, status = (0, os.waitpid(pid, 0)[1]) if die_at is None else _step(pid, die_at)
        with os.fdopen(reading) as said:
            text = said.read()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps([number, text, steps]), flush=True)


def _work(
    said: int,
    work: str,
    root: str,
    arguments: list[Any],
    die_at: int | None = None,
    clock: float = 0.0,
    at: float | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """In the child, which ends here.

    Args:
        said: a pipe for the result.
        die_at: the system call before which it is killed; 0: they are counted only; None: not even that.
        clock: seconds by which all clocks are ahead, this machine's and the storage's.
        at: when to begin (CLOCK_MONOTONIC); others may begin then too.
    """
    try:
        os.environ.update(environment or {})
        tempfile.tempdir = None
        _be_impatient()
        if clock:
            _set_clock(clock)
        storage = Storage(root)
        if at is not None:
            while time.monotonic() < at:
                pass
        if die_at is not None:
            _libc().ptrace(TRACE_ME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            text = json.dumps(WORKS[work](storage, *arguments))
        except PipelineError as err:
            text = f"{type(err).__name__}: {err}"
        os.write(said, text.encode())
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _step(pid: int, die_at: int) -> tuple[int, int]:
    """Let a child go on from system call to system call. Returns: how many it began, and its status."""
    steps, pass_on, entering = 0, 0, True
    while True:
        _libc().ptrace(SYSCALL, pid, None, pass_on)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return steps, status
        pass_on = os.WSTOPSIG(status)
        if pass_on == AT_SYSCALL:
            pass_on = 0
            steps += entering
            if entering and steps == die_at:
                os.kill(pid, signal.SIGKILL)  # the call is not done any more
                return steps, os.waitpid(pid, 0)[1]
            entering = not entering


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    return libc


def _be_impatient() -> None:
    """Time-outs of a second: nobody waits half a minute for a network that is broken on purpose."""
    from sae.store.storage import s3

    s3.OPTIONS["config_kwargs"] |= {"connect_timeout": 2, "read_timeout": 1}
    signed_get.STALL_SECONDS, http_ranges.PAUSE_SECONDS = 0.5, 0.01


def _set_clock(ahead: float) -> None:
    now, now_ns, stored = time.time, time.time_ns, Storage.now
    time.time = lambda: now() + ahead
    time.time_ns = lambda: now_ns() + int(ahead * 1e9)
    Storage.now = lambda self: stored(self) + ahead  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
