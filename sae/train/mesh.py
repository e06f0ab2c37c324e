"""A mesh of processes that share one SAE: which rows and latents each has, and the collectives between them.

Rank r has the rows of data rank r // L and the latents of latent rank r % L on a mesh of D x L, so that the devices of
a machine, whose ranks follow each other, are neighbours along the latent axis, where most is told.

What a rank receives in a step of topk, with b rows of B, n / L latents, and s bytes for a number:

    candidates           b k s (L - 1) / L, and back (s + 4) b (L - 1) / L: threshold and places
    reconstruction       2 b d s (L - 1) / L
    gradients            2 (2 n d / L + n / L + d) s (D - 1) / D
    rows                 4 b d, but for the first rank of a host with these rows, which reads them

and little else: latents that have fired, scalars, the gradient of b_dec. The pre-activations [b, n]
never leave their rank, nor does anything else with a column for every latent.
"""

import contextlib
import itertools
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sae.config import digest
from sae.errors import ConfigError, TransientError
from sae.train.collectives import ALONE, Collectives, Neighbours
from sae.train.config import MeshConfig
from sae.train.largest import cut_rows, keep_in_rows, n_th_largest, places_left

__all__ = ["Mesh", "MeshConfig", "connect"]

JOIN_SECONDS = 600.0
"""Until all processes of a mesh have come: each loads torch first, on a machine that may be busy, however short the
timeout of collectives is."""

_LOST = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
_LOST_BY_GLOO = re.compile(r"\[[^\s\]]*/gloo/transport/|Application timeout caused pair closure")
"""gloo raises a plain RuntimeError, like a wrong shape: one of its transport begins with the place in its sources
("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer"), and only the first one after a timeout does."""


@contextlib.contextmanager
def connect(config: MeshConfig, timeout_seconds: float, device: torch.device | str = "cpu") -> Iterator[Collectives]:
    """Join the other processes of a mesh while the block runs; a mesh of one is `ALONE` and starts nothing.

    Reads what torchrun tells every process: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Tensors of the CPU travel by
    gloo, those of a GPU by NCCL.

    Args:
        timeout_seconds: a collective that takes longer has lost a process, and fails on the others. Joining may take
            JOIN_SECONDS.
        device: that this process computes on: a GPU of its own, or the CPU. Of one kind on all processes.

    Raises: ConfigError when there are more or fewer processes than the mesh has places, or some of them compute on
        GPUs and some do not; TransientError when the others cannot be reached.
    """
    if config.world == 1:
        yield ALONE
        return
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.world:
        raise ConfigError(
            f"a mesh of {config.data} x {config.latents} needs {config.world} processes, {started} were started. "
            f"Start as many (torchrun --nnodes times --nproc-per-node)."
        )
    backend = "gloo"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL asks no tensor for it
        backend = "cpu:gloo,cuda:nccl"
    with _peers("joining"):
        dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))
    try:
        mesh = Mesh(config, timedelta(seconds=timeout_seconds))
        _check_devices(mesh, device)
        yield mesh
    finally:
        dist.destroy_process_group()


def _check_devices(mesh: "Mesh", device: torch.device) -> None:
    """Raises: ConfigError, on every process, when they compute on devices of different kinds."""
    n_on_cpu = mesh.collect(int(device.type == "cpu")).count(1)
    if 0 < n_on_cpu < mesh.world:
        raise ConfigError(
            f"execution.device: {n_on_cpu} of the {mesh.world} processes of the mesh found no GPU that works on their "
            f"machine ({platform.node()} computes on {device.type}). Set execution.device to cpu, or to cuda: then the "
            f"machine that has none says why."
        )


class Mesh(Collectives):
    """This process's place in a mesh whose processes have joined.

    Attributes:
        received: bytes that this rank has received from others, by method; an all-reduce counts as the ring that it
            is, 2 (m - 1) / m of its tensor between m ranks.
    """

    def __init__(self, config: MeshConfig, timeout: timedelta) -> None:
        self.rank, self.world = dist.get_rank(), config.world
        self.n_data, self.n_latent = config.data, config.latents
        self.data_rank, self.latent_rank = divmod(self.rank, self.n_latent)
        # Ranks with the same latents write neighbouring shares of them.
        self.share = self.latent_rank * self.n_data + self.data_rank
        self.received: Counter[str] = Counter()
        ranks = torch.arange(self.world).view(self.n_data, self.n_latent)
        own_group = _Groups(self.rank, timeout)
        self._all = own_group([ranks.flatten().tolist()])
        self._others_latents = own_group(ranks.tolist())
        self._others_rows = own_group(ranks.T.tolist())
        hosts = self._by_host()
        self.same_host = _HostGroup(own_group(hosts), self.received)
        of_batch = [[rank for rank in host if rank in row] for row in ranks.tolist() for host in hosts]
        self.same_batch = _HostGroup(own_group([group for group in of_batch if group]), self.received)

    def _by_host(self) -> list[list[int]]:
        """The ranks of every host. Agents of torchrun count as hosts: they may be in containers of one machine."""
        host = digest([platform.node(), os.environ.get("GROUP_RANK", "")])
        numbers = torch.zeros(self.world, dtype=torch.int64)
        numbers[self.rank] = int(host[:15], 16)
        ranks: dict[int, list[int]] = {}
        with _peers("hosts"):
            dist.all_reduce(numbers, group=self._all)
        for rank, number in enumerate(numbers.tolist()):
            ranks.setdefault(number, []).append(rank)
        return list(ranks.values())

    def latents(self, d_sae: int) -> slice:
        """An interval, equally many for every latent rank. Raises: ConfigError when that cannot be."""
        n_own, rest = divmod(d_sae, self.n_latent)
        if rest:
            raise ConfigError(
                f"{d_sae} latents cannot be shared evenly by {self.n_latent} ranks. "
                f"Choose a d_sae that is a multiple of mesh.latents."
            )
        return slice(self.latent_rank * n_own, (self.latent_rank + 1) * n_own)

    def sum_latents(self, partial: Tensor) -> Tensor:
        """In place, where `partial` is contiguous."""
        return self._reduce("sum_latents", partial, self._others_latents)

    def norm_latents(self, norm: Tensor) -> Tensor:
        """Root of the sum of squares."""
        return self._reduce("norm_latents", norm.square(), self._others_latents).sqrt_()

    def sum_rows(self, total: Tensor) -> Tensor:
        """In place, where `total` is contiguous."""
        return self._reduce("sum_rows", total, self._others_rows)

    def any_rows(self, flags: Tensor) -> Tensor:
        """A byte a flag."""
        return self._reduce("any_rows", flags.to(torch.uint8), self._others_rows, dist.ReduceOp.MAX).bool()

    def among_largest_of_row(self, values: Tensor, k: int) -> Tensor | None:
        """By two all-to-all exchanges: every rank merges the candidates of its share of the rows.

        The numbers of the latents do not travel: thresholds do, and how many ties each rank may keep.
        """
        if self.n_latent == 1:
            return None
        n_rows, n_columns = values.shape
        candidates = values.new_full((n_rows, k), -torch.inf)
        candidates[:, :n_columns] = values
        ends = [n_rows * rank // self.n_latent for rank in range(self.n_latent + 1)]
        shares = [end - start for start, end in itertools.pairwise(ends)]
        mine = [shares[self.latent_rank]] * self.n_latent
        seen = self._exchange("among_largest_of_row", candidates, shares, mine)
        cuts = cut_rows(seen.view(self.n_latent, mine[0], k), k)
        return keep_in_rows(values, self._exchange("among_largest_of_row", cuts.flatten(0, 1), mine, shares))

    def among_largest_of_batch(self, values: Tensor, n: int) -> Tensor | None:
        """By a radix select: three sums of 2,048 counts for float32."""

        def summed(counts: Tensor) -> Tensor:
            return self._reduce("among_largest_of_batch", counts, self._all)

        found = n_th_largest(values, n, summed)
        if found is None:
            return None
        threshold, n_places = found
        above, tied = values > threshold, values == threshold
        n_tied = torch.zeros(self.world, dtype=torch.int64, device=values.device)
        n_tied[self.rank] = tied.sum()
        places = places_left(summed(n_tied), n_places)[self.rank]
        return above.logical_or_(tied.logical_and_(tied.cumsum(dim=0) <= places))

    def nth_largest_of_batch(self, values: Tensor, n: int) -> Tensor | None:
        """By the same radix select."""
        found = n_th_largest(values, n, lambda counts: self._reduce("nth_largest_of_batch", counts, self._all))
        return None if found is None else found[0]

    def sum_all(self, total: Tensor) -> Tensor:
        """In place, where `total` is contiguous."""
        return self._reduce("sum_all", total, self._all)

    def gather_latents(self, own: Tensor) -> Tensor | None:
        """To the first rank, from the ranks that share its rows."""
        if self.data_rank > 0:
            return None
        whole = own.new_empty(self.n_latent * len(own), *own.shape[1:]) if self.rank == 0 else None
        with _peers("gather_latents"):
            dist.gather(
                own.contiguous(), None if whole is None else list(whole.split(len(own))), 0, self._others_latents
            )
        return whole

    def from_first(self, tensor: Tensor) -> Tensor:
        """In place, where `tensor` is contiguous."""
        tensor = tensor.contiguous()
        with _peers("from_first"):
            dist.broadcast(tensor, self.rank - self.latent_rank, self._others_latents)
        if self.latent_rank > 0:
            self.received["from_first"] += tensor.nbytes
        return tensor

    def to_first(self, own: Tensor) -> Tensor:
        """The lengths first, then the tensors."""
        n_others = [0] * (self.n_latent - 1)
        lengths = torch.zeros(self.n_latent, dtype=torch.int64)
        lengths[self.latent_rank] = len(own)
        lengths = self._reduce("to_first", lengths, self._others_latents)
        received = lengths.tolist() if self.latent_rank == 0 else [0, *n_others]
        return self._exchange("to_first", own.contiguous(), [len(own), *n_others], received)

    def agree_each(self, wishes: Sequence[bool]) -> list[bool]:
        """By one maximum over all ranks, on the CPU: a GPU computes on meanwhile."""
        found = self._reduce("agree_each", torch.tensor(wishes, dtype=torch.uint8), self._all, dist.ReduceOp.MAX)
        return found.bool().tolist()

    def tell(self, text: str) -> str:
        """Its length first, then its bytes."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        n_bytes = int(self.collect(len(data))[0])
        data = data if self.rank == 0 else torch.empty(n_bytes, dtype=torch.uint8)
        with _peers("tell"):
            dist.broadcast(data, 0, self._all)
        return bytes(data.tolist()).decode()

    def collect(self, number: int) -> list[int]:
        """By a sum: every rank fills the place of its share."""
        numbers = torch.zeros(self.world, dtype=torch.int64)
        numbers[self.share] = number
        return self._reduce("collect", numbers, self._all).tolist()

    def once(self, action: Callable[[], None]) -> None:
        """The others learn how it ended, so none of them waits for a first rank that has failed."""
        error: BaseException | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as err:
                error = err
        failed = self.agree(error is not None)
        if error is not None:
            raise error
        if failed:
            raise TransientError("the first rank could not do what is done once for all: its own error says why.")

    def _reduce(
        self, method: str, tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        n_ranks = group.size()
        if n_ranks == 1 or tensor.numel() == 0:
            return tensor
        tensor = tensor.contiguous()
        with _peers(method):
            dist.all_reduce(tensor, op, group)
        self.received[method] += 2 * tensor.nbytes * (n_ranks - 1) // n_ranks
        return tensor

    def _exchange(self, method: str, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send as many rows to every latent rank as `sent` says, in order; those that come, by rank."""
        found = rows.new_empty(sum(received), *rows.shape[1:])
        with _peers(method):
            dist.all_to_all_single(found, rows, received, sent, self._others_latents)
        n_others = len(found) - received[self.latent_rank]
        self.received[method] += n_others * found[:1].nbytes if len(found) else 0
        return found


class _HostGroup(Neighbours):
    """By two broadcasts: of numbers and size, and of the rows."""

    def __init__(self, group: dist.ProcessGroup, received: Counter[str]) -> None:
        self._group, self._received = group, received
        self._first = dist.get_global_rank(group, 0)
        self.reads = dist.get_rank() == self._first

    def tell_rows(self, rows: Tensor | None, numbers: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
        if self._group.size() == 1:
            return super().tell_rows(rows, numbers, device)
        shape = list(rows.shape) if rows is not None else [0, 0]
        head = torch.tensor([*shape, *numbers])
        with _peers("tell_rows"):
            dist.broadcast(head, self._first, self._group)
            n_rows, d_in, *numbers = head.tolist()
            rows = torch.empty(n_rows, d_in, dtype=torch.float32, device=device) if rows is None else rows.contiguous()
            dist.broadcast(rows, self._first, self._group)
        self._received["tell_rows"] += 0 if self.reads else head.nbytes + rows.nbytes
        return rows, numbers


class _Groups:
    """The groups of a rank. Every process makes all groups, in the same order; the same ranks are one group."""

    def __init__(self, rank: int, timeout: timedelta) -> None:
        self._rank, self._timeout = rank, timeout
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def __call__(self, groups: list[list[int]]) -> dist.ProcessGroup:
        """Of these groups the one of the rank."""
        for ranks in map(tuple, groups):
            if ranks not in self._made:
                with _peers("forming groups"):
                    self._made[ranks] = dist.new_group(list(ranks), self._timeout)
        return next(self._made[tuple(ranks)] for ranks in groups if self._rank in ranks)


@contextlib.contextmanager
def _peers(what: str) -> Iterator[None]:
    """Raises: TransientError when another rank has ended, hangs or cannot be reached; an error of any other kind stays
    what it is."""
    try:
        yield
    except RuntimeError as err:
        if not isinstance(err, _LOST) and not _LOST_BY_GLOO.search(str(err)):
            raise
        raise TransientError(
            f"rank {os.environ.get('RANK')} lost touch with the other ranks ({what}: {str(err).splitlines()[0]}). "
            f"One of them has ended or hangs: all are to be started again, and go on from their checkpoint."
        ) from err
