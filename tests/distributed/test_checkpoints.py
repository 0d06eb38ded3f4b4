# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint: what two processes save, others or one alone load, and go on with as if nothing was."""

import inspect
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from behaviour.common import WIDE, assert_close, norm_mlp, torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import Cases
from distributed.networks import (
    PLACES,
    assert_same_training,
    batches,
    full,
    joined,
    models,
    on_joined,
    on_shard,
    shard,
)

cases = Cases()
WRAPS = ("alone", "ddp", *PLACES)
DEPTH = 2
#: Torch 2.6 sees for itself that there is no group.
NO_GROUP = {"no_dist": True} if "no_dist" in inspect.signature(dcp.load).parameters else {}


def reversible(seed):
    """A model and its parameters, which differ from seed to seed; BatchNorm in the branches, for its buffers."""
    net, _ = models(norm_mlp, DEPTH, backend="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=WIDE))
    return net


def wrapped(net, wrap):
    if wrap == "alone":
        return net
    return DistributedDataParallel(net) if wrap == "ddp" else shard(net, wrap)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def take_step(model, optimizer, seed, wrap):
    """A training step. Statistics of the whole batch everywhere, so that all wraps do the same: in eval mode."""
    optimizer.zero_grad()
    model.eval()
    (on_joined if wrap == "alone" else on_shard)(model, seed)
    optimizer.step()


def trained(wrap):
    """A model and its optimizer after two steps, with statistics that are not the initial ones."""
    net = reversible(1)
    net.train()
    with torch.no_grad():
        net(joined(batches(7))[0])
    model = wrapped(net, wrap)
    optimizer = optimizer_of(model)
    for seed in range(2):
        take_step(model, optimizer, seed, wrap)
    return model, optimizer


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load(folder, model, optimizer, **options):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def assert_goes_on_alike(got, expected):
    """Each of the two is (model, optimizer, wrap): the same outputs, and the same next step."""
    x = joined(batches(5))[0]
    with torch.no_grad():
        assert_close(got[0].eval()(x), expected[0].eval()(x), 1e-14, "outputs")
    for each in (got, expected):
        take_step(each[0], each[1], 9, each[2])
    assert_same_training(got[0], expected[0], "the next step", 1e-12)


def checkpoint_of(case):
    return f"{case}.checkpoint", f"{case}.after"


@cases.over(wrap=WRAPS)
def saved(wrap):
    """Two processes save and load; and keep what the next step leads to, for one process to be compared with."""
    folder, after = map(Path, checkpoint_of(f"saved-{wrap}"))
    model, optimizer = trained(wrap)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    other = wrapped(reversible(2), wrap)
    other_optimizer = optimizer_of(other)
    load(folder, other, other_optimizer)
    assert_goes_on_alike((other, other_optimizer, wrap), (model, optimizer, wrap))
    values = {name: full(value) for name, value in get_model_state_dict(model).items()}
    if dist.get_rank() == 0:
        torch.save(values, after)


@cases.over(first=("ddp", "everywhere"), second=("alone", "ddp", "blocks"))
def loaded_elsewhere(first, second):
    """What one wrap saved, another one loads."""
    folder = Path(f"{first}-for-{second}.checkpoint")
    model, optimizer = trained(first)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    other = wrapped(reversible(2), second)
    other_optimizer = optimizer_of(other)
    load(folder, other, other_optimizer)
    assert_goes_on_alike((other, other_optimizer, second), (model, optimizer, first))


@cases.over(wrap=("ddp", "branches"))
def from_one_process(wrap):
    """What one process saved, two load."""
    folder = Path(f"alone-for-{wrap}.checkpoint")
    by_itself = NO_GROUP or {"process_group": dist.new_group([0])}
    model, optimizer = trained("alone")
    if dist.get_rank() == 0:
        dcp.save(state_of(model, optimizer), checkpoint_id=folder, **by_itself)
    dist.barrier()
    other = wrapped(reversible(2), wrap)
    other_optimizer = optimizer_of(other)
    load(folder, other, other_optimizer)
    assert_goes_on_alike((other, other_optimizer, wrap), (model, optimizer, "alone"))


@cases.over(wrap=WRAPS)
def full_state_dict(wrap):
    """The whole state dict has an ordinary model's names and values, and goes back from rank 0 alone."""
    model, _ = trained(wrap)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    plain = trained("alone")[0].state_dict()
    if dist.get_rank() == 0:
        reversible(2).load_state_dict(state)
        for name, value in plain.items():
            assert_close(state[name], value, 1e-12, name)
    other = wrapped(reversible(3), wrap)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, state if dist.get_rank() == 0 else {}, options=options)
    x = joined(batches(5))[0]
    with torch.no_grad():
        assert_close(other.eval()(x), model(x), 1e-14, "outputs")


SAVED = [name for name in cases if name.startswith("saved")]


@pytest.mark.parametrize("case", [name for name in cases if name not in SAVED])
def test_checkpoints(case, passes):
    passes(case)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("case", SAVED)
def test_one_process_loads(case, passes, processes):
    """What two processes saved, this one loads without any group, and its next step is theirs."""
    passes(case)
    checkpoint, after = (processes.folder / name for name in checkpoint_of(case))
    net = reversible(2)
    optimizer = optimizer_of(net)
    load(checkpoint, net, optimizer, **NO_GROUP)
    take_step(net, optimizer, 9, "alone")
    expected = torch.load(after)
    assert net.state_dict().keys() == expected.keys()
    for name, value in net.state_dict().items():
        assert_close(value, expected[name], 1e-12, name)
