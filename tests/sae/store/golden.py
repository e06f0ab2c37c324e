"""Five rows and their part files, one for each dtype, as format 2 has them for good: in the folder golden/.

A change of these bytes is a change of format: a new number, a new folder, a new FORMAT.md.
"""

import json
from pathlib import Path

import numpy as np
import torch

from sae.store.part.encoding import Dtype, encode
from sae.store.part.writer import PartLayout, write_part

FOLDER = Path(__file__).with_name("golden")
DTYPES: tuple[Dtype, ...] = ("float16", "float32", "bfloat16", "int8")
ROW_GROUP_ROWS = 3
ACT = np.array(
    [
        [0.0, -1.0, 0.5, 40000.0],
        [0.25, -0.125, 0.5, -8.0],
        [3.140625, 1e-3, 0.5, 1024.0],
        [-2.5, 2.0, 0.5, 7.0],
        [1.0, 65.0, 0.5, -0.0],
    ],
    np.float32,
)
"""One value too large for float16 without a scale, one constant dimension. [5, 4]"""
IDENTITY = {
    "seq": np.array([7, 0, 123456, 7, 2**31 - 1], np.int32),
    "pos": np.array([1, 0, 511, 2, 4095], np.int32),
    "token": np.array([-1, 0, 50256, 13, 2047], np.int32),
}


def write(folder: Path) -> dict[Dtype, PartLayout]:
    """The files as they are written now: <dtype>.parquet and its layout, <dtype>.json."""
    layouts = {}
    for dtype in DTYPES:
        stored, encoding = encode(torch.from_numpy(ACT), dtype)
        path = folder / f"{dtype}.parquet"
        layouts[dtype] = write_part(path, stored, **IDENTITY, row_group_rows=ROW_GROUP_ROWS, encoding=encoding)
        (folder / f"{dtype}.json").write_text(json.dumps(layouts[dtype].model_dump(mode="json"), indent=1) + "\n")
    return layouts
