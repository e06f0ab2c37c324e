"""Rendered reports to look at, and a browser to look with."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from sae.report.config import ReportSpec
from sae.report.render import render_report
from sae.store.artefacts.records import Record
from sae.store.storage.filesystem import Storage


class Rendered(NamedTuple):
    """A committed report and where it lies."""

    storage: Storage
    spec: ReportSpec
    record: Record
    folder: Path


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module that makes artefacts up; it imports its neighbours as a script beside them would."""
    return import_beside("synthetic")


def import_beside(name: str) -> ModuleType:
    """A module of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def render(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """Make artefacts up and render them; keyword arguments go to `demo_spec`, or to `whole_spec` with `whole`."""

    def rendered(**options: Any) -> Rendered:
        storage = Storage(str(tmp_path_factory.mktemp("root")))
        whole = options.pop("whole", False)
        spec = (import_beside("synthetic_whole").whole_spec if whole else synthetic.demo_spec)(storage, **options)
        record = render_report(storage, spec, synthetic.LINEAGE)
        return Rendered(storage, spec, record, Path(storage.full(record.folder)))

    return rendered


@pytest.fixture(scope="session")
def report(render: Callable[..., Rendered]) -> Rendered:
    return render()


@pytest.fixture(scope="session")
def sweep_report(render: Callable[..., Rendered]) -> Rendered:
    """Two SAEs: one on text, one of eight latents on given activations."""
    return render(n_latents=70, sweep=True)


@pytest.fixture(scope="session")
def hostile_report(render: Callable[..., Rendered]) -> Rendered:
    """Tokens, labels, document names, SAE name and title that try to be markup."""
    return render(n_latents=120, hostile=True)


@pytest.fixture(scope="session")
def whole_report(render: Callable[..., Rendered]) -> Rendered:
    """A report with every view: two SAEs that can be compared, and one of given activations."""
    return render(whole=True)
