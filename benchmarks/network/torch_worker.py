# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (PyTorch is an extra, which the type check does without.)
"""One process of network.run --peers: what PyTorch offers on the same links, with the same rounds.

DistributedDataParallel on gloo, of 24 linear layers of 1024 x 1024 without bias, batch 1 (25.2 M
parameters): as it is, with its fp16 hook, and with PowerSGD of rank 1. Lion follows, as in the
methods of JAX. DDP's bf16 and quantisation hooks do not run on gloo. DeepSpeed dropped its 1-bit
optimizers after 0.19.6, and they never ran on CPU.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.network import rounds

LR, WD, B1, B2 = 1e-4, 0.1, 0.9, 0.99
MATRICES, SIDE = 24, 1024
WHOLE_MB = 200  # a bucket that holds all: with several, PowerSGD's hooks deadlock on gloo
FLOAT = {"torch ddp": 4, "torch ddp fp16": 2}  # bytes of a gradient on the wire
PARAMETERS = MATRICES * SIDE * SIDE
VERSIONS = {"torch": torch.__version__}


class Lion:
    """Lion, all tensors at once."""

    def __init__(self, params: list[Any]) -> None:
        self.params, self.mu = params, [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters by their gradients."""
        grads = [p.grad for p in self.params]
        direction = torch._foreach_mul(self.mu, B1)
        torch._foreach_add_(direction, grads, alpha=1 - B1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(self.params, 1 - LR * WD)
        torch._foreach_add_(self.params, direction, alpha=-LR)
        torch._foreach_lerp_(self.mu, grads, 1 - B2)


def predicted(name: str, n: int) -> int:
    """Bytes that each process receives a step, with all-reduces that waste nothing."""
    if name == "torch local":
        return 0
    if name == "torch ddp powersgd":  # of each matrix, one vector of each side
        return 2 * (n - 1) * 4 * MATRICES * 2 * SIDE // n
    return 2 * (n - 1) * FLOAT[name] * PARAMETERS // n


class Runner:
    """One method, ready to step."""

    warmup = 4  # DDP rebuilds its buckets, PowerSGD starts with its third step

    def __init__(self, name: str, n: int, process: int) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(MATRICES)]
        self.model: Any = torch.nn.Sequential(*layers)
        if name == "torch ddp powersgd":
            self.model = DistributedDataParallel(self.model, bucket_cap_mb=WHOLE_MB)
            state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif name != "torch local":
            self.model = DistributedDataParallel(self.model)
            if name == "torch ddp fp16":
                self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        self.lion = Lion(list(self.model.parameters()))
        self.batch = torch.randn(1, SIDE, generator=torch.Generator().manual_seed(process))
        self.facts = {
            "predicted": predicted(name, n),
            "transport": "" if name == "torch local" else "all_reduce",
            "parameters": PARAMETERS,
            "versions": VERSIONS,
        }

    def run(self) -> None:
        """One step."""
        self.model.zero_grad(set_to_none=False)
        self.model(self.batch).square().mean().backward()
        self.lion.step()


def main() -> int:
    """Joins the others, measures, writes."""
    task = json.loads(sys.argv[1])
    n, i = task["processes"], task["process"]
    os.environ["GLOO_SOCKET_IFNAME"] = task["interface"]
    where = f"tcp://{task['coordinator']}"
    dist.init_process_group("gloo", init_method=where, world_size=n, rank=i)
    runners = {name: Runner(name, n, i) for name in task["methods"]}

    def anyone(late: bool) -> bool:
        flag = torch.tensor(float(late))
        dist.all_reduce(flag)
        return bool(flag)

    rounds.measure(runners, task["interface"], lambda _: dist.barrier(), anyone)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
