# SPDX-License-Identifier: Apache-2.0
"""The README's wire table: bits per parameter that each worker receives per step, from the ledger.

    python -m benchmarks.compute.wire_table

The tree is one matrix of 4096 x 4096 (16.8 M parameters). A test compares this script's output with
the README, and others compare the ledger with compiled programs.
"""

import argparse
import sys

import jax
import jax.numpy as jnp

from benchmarks.cli import command_line, guarded
from benchmarks.report import markdown
from distlion_jax import full_precision_cost, wire_cost
from distlion_jax.baselines import QSGD, Compressor, EFSign, PowerSGD, TernGrad, TopK

WORKERS = (2, 4, 8, 32, 128)
PARAMS = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
ROWS: tuple[tuple[str, dict[str, str]], ...] = (
    ("majority, coin ties, `two_phase`", {"ties": "coin", "transport": "two_phase"}),
    ("majority, zero ties, `two_phase`", {"transport": "two_phase"}),
    ("majority, `all_gather`", {"transport": "all_gather"}),
    ("majority, ternary ballot, `two_phase`", {"ballot": "ternary", "transport": "two_phase"}),
    ("average, `two_phase`", {"aggregation": "average", "transport": "two_phase"}),
    ("majority, `psum` (uncompressed oracle)", {"transport": "psum"}),
)
BASELINES: tuple[tuple[str, Compressor], ...] = (
    ("QSGD, 4 bits (gathered)", QSGD()),
    ("TernGrad (counted by the vote)", TernGrad()),
    ("EF-signSGD (gathered)", EFSign()),
    ("Top-K of 1 %: GradDrop, DGC (gathered)", TopK(0.01)),
    ("PowerSGD of rank 2 (all-reduced)", PowerSGD(2)),
)


def table() -> str:
    """Return the table in Markdown."""
    full = [full_precision_cost(PARAMS, n).bits_per_parameter for n in WORKERS]
    rows = [("full precision (ring all-reduce, float32)", full)]
    for name, options in ROWS:
        costs = [wire_cost(PARAMS, n, **options) for n in WORKERS]  # type: ignore[arg-type]
        rows.append((name, [cost.bits_per_parameter for cost in costs]))
    for name, compressor in BASELINES:
        rows.append((name, [compressor.cost(PARAMS, n).bits_per_parameter for n in WORKERS]))
    head = ["bits received per parameter and step", *(f"n = {n}" for n in WORKERS)]
    return markdown.table(head, ([name, *(f"{b:.2f}" for b in bits)] for name, bits in rows))


def run(args: argparse.Namespace) -> str:
    """The table."""
    del args
    return table()


if __name__ == "__main__":
    sys.exit(guarded(run, command_line(__doc__).parse_args()))
