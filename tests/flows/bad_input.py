"""Ways to spoil a valid config, its corpus, its model or its given activations."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sae.plan import make_plan
from sae.store import layout
from tests.flows.conftest import tiny_config


@dataclass
class Box:
    """What a case starts from: a valid config on a small corpus, in a folder of its own."""

    folder: Path
    saved_model: Path
    config: dict[str, Any]
    raw: str | bytes | None = None
    """The config file's content, when it is not the JSON of `config`."""
    suffix: str = ".json"
    arguments: list[str] = field(default_factory=list)
    command: str = "run"
    root: str = ""
    source: str | None = None
    """The recipe or file that is named, when it is not the config file."""

    def put(self, path: str, value: Any) -> None:
        """Set one value of the config; `None` as the last key of a list appends."""
        *parents, last = path.split(".")
        target: Any = self.config
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def command_line(self) -> list[str]:
        content = json.dumps(self.config) if self.raw is None else self.raw
        file = self.write(f"config{self.suffix}", content)
        return [self.command, self.source or str(file), "--root", self.root, *self.arguments]


Change = Callable[[Box], Any]


def put(path: str, value: Any) -> Change:
    return lambda box: box.put(path, value)


def raw(text: str | bytes, suffix: str = ".json") -> Change:
    def change(box: Box) -> None:
        box.raw, box.suffix = text, suffix

    return change


def arguments(*options: str, command: str = "run") -> Change:
    def change(box: Box) -> None:
        box.arguments, box.command = list(options), command

    return change


def root(place: str) -> Change:
    def change(box: Box) -> None:
        box.write("a-file", "x")
        box.root = place.replace("FOLDER", str(box.folder))

    return change


def text(files: dict[str, bytes | str], url: str = "text/*", kind: str = "text", **sections: Any) -> Change:
    """A corpus of these files."""

    def change(box: Box) -> None:
        for name, data in files.items():
            box.write(f"text/{name}", data)
        box.put("corpus.segments", [{"kind": kind, "urls": [f"{box.folder}/{url}"]}])
        for path, value in sections.items():
            box.put(path.replace("__", "."), value)

    return change


def source(value: Any, *, heldout: float = 0.0, **sae: Any) -> Change:
    """Given activations: inline rows, a source, or an array that is saved as .npy."""

    def change(box: Box) -> None:
        given = value
        if isinstance(value, np.ndarray):
            with open(box.folder / "given.npy", "wb") as file:
                if value.dtype == object:  # as a pickled array begins; nothing is pickled, not even to be refused
                    header = {"descr": "|O", "fortran_order": False, "shape": value.shape}
                    np.lib.format.write_array_header_1_0(file, header)
                else:
                    np.save(file, value)
            given = {"kind": "file", "url": "FOLDER/given.npy"}
        elif isinstance(value, list):
            given = {"kind": "inline", "values": value}
        given = json.loads(json.dumps(given).replace("FOLDER", str(box.folder)))
        box.config = {
            "activations": {"kind": "given", "sets": {"mine": given}, "heldout_fraction": heldout},
            "saes": [{"sae": {"architecture": "topk", "d_sae": 8, "k": 2}, "batch_rows": 2} | sae],
        }

    return change


def given_file(name: str, data: bytes) -> Change:
    def change(box: Box) -> None:
        box.write(name, data)
        source({"kind": "file", "url": f"FOLDER/{name}"})(box)

    return change


def tensors(**named: np.ndarray) -> Change:
    def change(box: Box) -> None:
        save_file(named, box.folder / "given.safetensors")
        source({"kind": "file", "url": "FOLDER/given.safetensors"})(box)

    return change


def model(change_folder: Callable[[Path], Any] = lambda folder: None, **sections: Any) -> Change:
    """A tiny GPT-2 in a folder of its own, changed."""

    def change(box: Box) -> None:
        folder = box.folder / "model"
        shutil.copytree(box.saved_model, folder)
        change_folder(folder)
        box.put("subject", {"kind": "huggingface", "name": str(folder)})
        box.put("activations.hook_points", ["transformer.h.0.mlp.act"])
        for path, value in sections.items():
            box.put(path.replace("__", "."), value)

    return change


def config_of_model(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def weights_of(kind: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if kind == "pickled":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        elif kind == "truncated":
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        else:
            index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def slow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1}))
    settings = {"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def newer_format(box: Box) -> None:
    plan = make_plan(tiny_config(Path(box.root), Path(box.config["corpus"]["segments"][0]["urls"][0]).parent))
    path = Path(box.root) / layout.record_path(plan.saes[0].ref)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 999, "what": "nobody knows"}))


def many(*changes: Change) -> Change:
    def change(box: Box) -> None:
        for each in changes:
            each(box)

    return change
