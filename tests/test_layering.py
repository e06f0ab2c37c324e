"""Imports point one way: flows -> tasks -> sae; inside sae, stages do not import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"sae": set(), "tasks": {"sae"}, "flows": {"sae", "tasks"}}
STAGES = {"extract", "train", "evaluate", "statistics", "explain", "report"}
LEVELS = {
    "config": 0,
    "errors": 0,
    "progress": 0,
    "architectures": 1,
    "store": 1,
    "metrics": 1,
    "subject": 2,
    "weights": 2,
}
STORE_ROOMS = (("storage", "part"), ("artefacts",), ("snapshots",), ("text", "reading"), ("upkeep",))
"""Folders of the store, lowest first: each may use those of lower levels; the modules beside them use no folder."""


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package: str) -> None:
    allowed = LAYERS[package] | {package}
    for path in sorted((ROOT / package).rglob("*.py")):
        tops = {name.partition(".")[0] for name in imported_modules(path)}
        assert not tops & (set(LAYERS) - allowed), path
        assert package != "sae" or "prefect" not in tops, path


def test_stages_meet_in_the_store_and_not_in_imports() -> None:
    """A stage may use another's config (specs name their inputs) and nothing else of it."""
    for stage in STAGES:
        for path in sorted((ROOT / "sae" / stage).rglob("*.py")):
            others = {
                name
                for name in imported_modules(path)
                if name.startswith("sae.")
                and name.split(".")[1] in STAGES - {stage}
                and name.split(".")[2:3] != ["config"]
                and name.split(".")[1:] != [name.split(".")[1]]
            }
            assert not others, f"{path} imports {others}"


def test_serve_stands_on_the_report_and_nothing_in_sae_stands_on_it() -> None:
    """It shows a report with its model; of the other stages it knows what the store says."""
    for path in sorted((ROOT / "sae").rglob("*.py")):
        parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("sae.")}
        if path.is_relative_to(ROOT / "sae" / "serve"):
            assert not parts & (STAGES - {"report"}), path
        else:
            assert "serve" not in parts, path


def test_lower_layers_do_not_import_higher_ones() -> None:
    for layer, level in LEVELS.items():
        place = ROOT / "sae" / layer
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            for name in imported_modules(path):
                parts = name.split(".")
                if parts[0] != "sae" or len(parts) < 2:
                    continue
                assert parts[1] not in STAGES, f"{path} imports {name}"
                assert LEVELS.get(parts[1], level) <= level, f"{path} imports {name}"


def test_rooms_of_the_store_stand_on_those_below() -> None:
    store = ROOT / "sae" / "store"
    rooms = {room for level in STORE_ROOMS for room in level}
    assert {path.parent.name for path in store.glob("*/__init__.py")} == rooms
    for path in sorted(store.rglob("*.py")):
        room = path.parent.name
        height = next((i for i, level in enumerate(STORE_ROOMS) if room in level), 0)
        allowed = {room, *(name for level in STORE_ROOMS[:height] for name in level)}
        used = {name.split(".")[2] for name in imported_modules(path) if name.startswith("sae.store.")}
        assert not used & rooms - allowed, path


def test_processes_that_share_an_sae_are_known_to_the_mesh_alone() -> None:
    """What trains imports no torch.distributed: who starts several processes hands it a mesh."""
    for path in sorted((ROOT / "sae").rglob("*.py")):
        if path != ROOT / "sae" / "train" / "mesh.py":
            names = set(imported_modules(path))
            assert not any(name.startswith(("torch.distributed", "sae.train.mesh")) for name in names), path
