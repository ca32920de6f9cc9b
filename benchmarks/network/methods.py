# SPDX-License-Identifier: Apache-2.0
"""What network.run compares, by the names that its tables use; imports nothing slow."""

from typing import Any

DENSE = {"lion fp32": "f32", "lion bf16": "bf16"}  # dtype of the all-reduced gradients
VOTES: dict[str, dict[str, Any]] = {  # options of distributed_lion
    "majority": {},
    "majority, 8 chunks": {"chunks": 8},
    "majority, coin": {"ties": "coin"},
    "majority, coin, 8 chunks": {"ties": "coin", "chunks": 8},
    "majority, all_gather": {"ties": "coin", "transport": "all_gather"},
    "majority, psum": {"transport": "psum"},
    "average": {"aggregation": "average"},
    "average, two_phase": {"aggregation": "average", "transport": "two_phase"},
}
# Classes of distlion_jax.baselines and their options, before Lion.
COMPRESSED: dict[str, tuple[str, dict[str, object]]] = {
    "qsgd": ("QSGD", {}),
    "terngrad": ("TernGrad", {}),
    "ef-sign": ("EFSign", {}),
    "top-k 1%": ("TopK", {"density": 0.01}),
    "powersgd": ("PowerSGD", {"rank": 1}),
}
# Devices of a process, by the axes that matrices are split over; in other workloads it has one.
SLICES = {"sharded": {"fsdp": 2, "tensor": 2}}
METHODS = ("local", *DENSE, *VOTES, *COMPRESSED)
SHARDED = ("local", "lion fp32", *VOTES)  # XLA for CPU aborts on the all-reduce in bfloat16
PEERS = ("torch local", "torch ddp", "torch ddp fp16", "torch ddp powersgd")
