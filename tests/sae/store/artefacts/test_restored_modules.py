"""A module restored from a checkpoint goes on bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from sae.errors import StoreError
from sae.store.artefacts.modules import module_tensors, restore_module
from sae.store.storage.filesystem import Storage
from tests.sae.store.artefacts.checkpointing import Place, checkpoints


class Module(nn.Module):
    """Tied weights, a buffer that is saved with the module and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("theta", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def step(self, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        self.b(self.a(x)).square().sum().backward()
        optimizer.step()
        self.theta += self.a.weight.detach().sum(0)
        self.count += 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_module_goes_on_bit_for_bit(fused: bool, memory_storage: Storage) -> None:
    def new(seed: int) -> tuple[Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module = Module()
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)

    batches = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    module, optimizer = new(1)
    for x in batches[:3]:
        module.step(optimizer, x)
    checkpoints(memory_storage).save(module_tensors(module, optimizer), Place(step=3, n_tokens=0))
    other, other_optimizer = new(2)
    place = checkpoints(memory_storage).load(
        lambda tensors, place: restore_module(other, other_optimizer, tensors, place.step)
    )
    assert place is not None
    assert other.b.weight is other.a.weight
    for x in batches[3:]:
        module.step(optimizer, x)
        other.step(other_optimizer, x)
    expected = module_tensors(module, optimizer)
    assert int(other.count) == 6
    for name, tensor in module_tensors(other, other_optimizer).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_module_that_does_not_fit_stays_as_it_was() -> None:
    module = Module()
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    module.step(optimizer, torch.ones(2, 3))
    tensors = {name: tensor.clone() + 1 for name, tensor in module_tensors(module, optimizer).items()}
    del tensors["adam.exp_avg_sq.b.bias"]
    before = {name: tensor.clone() for name, tensor in module_tensors(module, optimizer).items()}
    with pytest.raises(StoreError, match=r"no tensor adam\.exp_avg_sq\.b\.bias"):
        restore_module(module, optimizer, tensors, step=9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module_tensors(module, optimizer).items())
