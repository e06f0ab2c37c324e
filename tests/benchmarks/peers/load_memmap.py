"""torch's DataLoader with shuffle=True over a memory map: rows one by one as usual, or all of a batch by __getitems__.

python load_memmap.py FOLDER WORKERS rows|batches
"""

import itertools
import sys
from collections.abc import Iterator

import torch
from rows import Rows, report
from torch.utils.data import DataLoader, Dataset


class ByRow(Dataset):
    def __init__(self, rows: Rows) -> None:
        self.act = rows.act

    def __len__(self) -> int:
        return len(self.act)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.act[index]).float()


class ByBatch(ByRow):
    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.act[indices]).float()


def loader(rows: Rows, n_workers: int, how: str) -> Iterator[torch.Tensor]:
    if how == "rows":
        batches = DataLoader(ByRow(rows), rows.batch_rows, shuffle=True, num_workers=n_workers, drop_last=True)
    else:
        batches = DataLoader(
            ByBatch(rows), rows.batch_rows, shuffle=True, num_workers=n_workers, drop_last=True, collate_fn=lambda x: x
        )
    return itertools.chain.from_iterable(itertools.repeat(batches))


if __name__ == "__main__":
    given = Rows()
    report("torch", given, lambda: loader(given, int(sys.argv[2]), sys.argv[3]))
