"""One of two processes that train a patched model, started by test_patch_distributed.py; prints nothing if all is well.

Arguments: the rank, the port.
"""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from patch_helpers import watching
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_group

from red_kernels.edits import add_edit, switch_edit
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch, unpatch

NAMES = ("llama", "gpt2", "t5", "bert")
# Norms that read what another layer has returned.
ACROSS = ("input_layernorm", "model.norm", "ln_1", "ln_f", "layer.0.layer_norm", "final_layer_norm")


def wrapped(how: str, model: torch.nn.Module) -> torch.nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp layers":
        stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1]
        for layers in stacks:
            if type(layers[0]).__name__ in (model._no_split_modules or ()):
                for layer in layers:
                    fully_shard(layer)
    return fully_shard(model)


def train(parallel: torch.nn.Module, peers: tuple[zoo.Unfused, ...], name: str, rank: int, steps: int) -> None:
    """Train the parallel model on this process's batches, and each peer on those of both."""
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.1)
    others = []
    for peer in peers:
        vectors = [vector for parts in peer.vectors.values() for vector in parts.values()]
        others.append((peer, torch.optim.SGD(vectors, lr=0.1)))
    for step in range(steps):
        batches = [zoo.inputs(name, seed=10 * step + other) for other in range(2)]
        parallel(**batches[rank]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for peer, peer_optimizer in others:
            (sum(peer.model(**batch).loss for batch in batches) / 2).backward()
            peer_optimizer.step()
            peer_optimizer.zero_grad()


def main(how: str, rank: int) -> None:
    for name in NAMES:
        model = zoo.tiny(name)
        values = zoo.vectors(zoo.sites(name))
        unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
        patch(model, RedConfig())
        zoo.fill(edit_parameters(model), values)
        names = {id(module): name for name, module in model.named_modules()}
        monkeypatch = pytest.MonkeyPatch()
        watch = watching(monkeypatch)
        parallel = wrapped(how, model)
        train(parallel, (unfused, truth), name, rank, steps=2)
        monkeypatch.undo()
        try:
            unpatch(parallel)
        except ValueError as error:
            assert "wrapped after patching" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a wrapped model was unpatched")
        assert watch.taken == watch.left, (how, name)
        # Whole-model wrapping leaves the layers alone; wrapped layers hand nothing on.
        across = [norm for norm in watch.left if names[id(norm)].endswith(ACROSS)]
        expected = 2 * len(zoo.sites(name)) if how != "fsdp layers" and name in zoo.HANDING_ON else 0
        assert len(across) == expected, (how, name, len(across), expected)
        for site, parts in edit_parameters(model).items():
            for part, vector in parts.items():
                own = vector.full_tensor() if isinstance(vector, DTensor) else vector
                plain, exact = (peer.vectors[site][part] for peer in (unfused, truth))
                zoo.assert_as_exact(f"{how}: {name} {site}.{part}", own, plain, exact.double())
                assert not torch.equal(own, values[site][part])


def one_of_two_edits(rank: int) -> None:
    """DDP's third step finds gradients for all that is trainable, which an edit that is not active is not."""
    name = "llama"
    model = zoo.tiny(name)
    values = zoo.vectors(zoo.sites(name))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig())
    add_edit(model, "alice")
    switch_edit(model, "alice")
    zoo.fill(edit_parameters(model), values)
    parallel = DistributedDataParallel(model)
    train(parallel, (unfused, truth), name, rank, steps=3)
    for site, parts in edit_parameters(model, "alice").items():
        for part, vector in parts.items():
            plain, exact = (peer.vectors[site][part] for peer in (unfused, truth))
            zoo.assert_as_exact(f"alice: {site}.{part}", vector, plain, exact.double())
            untouched = edit_parameters(model, "default")[site][part]
            assert torch.equal(untouched, torch.full_like(untouched, float(part == "scale")))


if __name__ == "__main__":
    with in_group() as rank:
        for how in ("ddp", "fsdp layers", "fsdp whole"):
            main(how, rank)
        one_of_two_edits(rank)
