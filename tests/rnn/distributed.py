"""Training on two processes against one. Run by torchrun: each process prints what it found wrong,
and fails."""

import copy
import os
import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rnn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [rnn.RNN(4, 6, 2, bidirectional=True), rnn.LSTM(12, 6, proj_size=4), rnn.GRU(4, 5)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients after a step of the optimizer (which a second forward then
    sees)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.zeros(())
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
    grads: list[Any] = [p.grad for p in model.parameters()]
    return loss.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    processes = distributed.get_world_size()
    torch.manual_seed(0)
    alone = Model().double()
    x = torch.randn(7, 2 * processes, 4, dtype=torch.float64)
    shared = copy.deepcopy(alone)
    share = x.chunk(processes, 1)[rank]
    want_loss, want = step(alone, x)
    if sys.argv[1] == "ddp":
        loss, got = step(DistributedDataParallel(shared), share)
    else:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in shared.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(shared, mesh=mesh)
        loss, got = step(shared, share)
    distributed.all_reduce(loss)
    torch.testing.assert_close(loss / processes, want_loss, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # torch 2.11 at times aborts while it ends the threads of a mesh's groups
