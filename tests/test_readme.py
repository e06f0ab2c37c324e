"""The README's Python examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_notebook_example_runs() -> None:
    section = README.partition("## In a notebook")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names: dict[str, Any] = {}
        exec(code, names)
    assert names["latents"].shape == (4096, 256)
    assert int((names["latents"] > 0).sum(dim=1).max()) <= 8
    assert names["x_hat"].shape == names["x"].shape
    assert float((names["x_hat"] - names["x"]).square().mean()) < 0.8 * float(names["x"].var())
