# SPDX-License-Identifier: Apache-2.0
"""What is wrong with what a train step was given, said before it runs.

In:  the batch, state and extra arguments of a step (shapes and types).
Out: nothing, or a ``ValueError``. What ``update`` is given is checked in ``distlion_jax._checks``.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from distlion_jax.exchanges import exchanges


def check_averaged(state: Any) -> None:
    """Raises for a vote on gradients that the step has averaged: it would save nothing."""
    if exchanges(state):
        raise ValueError(
            "`tx` holds a vote or an average over the workers, and gradients='mean' averages "
            "before it. Use gradients='local'."
        )


def check_batch(batch: Any, n: int) -> None:
    """Raises unless every leaf has as many rows as the first, and n workers can share them."""
    first = None
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        rows = np.shape(x)[0] if np.ndim(x) else 0
        first = rows if first is None else first
        if rows != first:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has {rows} rows, the leaves before it "
                f"{first}: they are not of the same examples."
            )
        if rows == 0 or rows % n:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has {rows} rows, which {n} workers cannot "
                f"share equally. Use a multiple of {n}, or drop the remainder of the data."
            )


def check_step(batch: Any, state: Any, extra: dict[str, Any], n: int, shards: int) -> None:
    """Raises unless batch, per-worker state and extra arguments fit the number of workers."""
    check_batch(batch, shards)
    for kind, tree in (("state", state), ("extra", extra)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if np.shape(x)[:1] != (n,):
                raise ValueError(
                    f"`{kind}{jax.tree_util.keystr(path)}` has shape {np.shape(x)}; a leading axis "
                    f"of {n}, one entry a worker, was expected. Make states with init_state for "
                    "this mesh."
                )


def is_traced(tree: Any) -> bool:
    """Whether a step is called inside another transformation, where it cannot look at values."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def check_declared(state: Any) -> None:
    """Raises for a transformation that declares no exchange, in a step that nobody watches.

    A step compares the replicas of its parameters, but not where it is lowered, nor inside another
    transformation.
    """
    if not exchanges(state):
        raise ValueError(
            "`tx` declares no vote and no average over the workers, and a step that is lowered, or "
            "inside another transformation (as jax.jit), cannot compare their parameters: each "
            "worker could go its own way, in silence. Declare it, distlion_jax.exchange(tx), if it "
            "makes workers agree; or use distributed_lion, put average_gradients before it, or use "
            "make_train_step with gradients='mean'."
        )


def check_shapes(name: str, old: Any, new: Any) -> None:
    """Raises where a step changed shapes: a state that does not fit was broadcast."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    for (path, before), after in pairs:
        if np.shape(before) != np.shape(after):
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` would change shape in the step, from "
                f"{np.shape(before)} to {np.shape(after)}: the state does not fit the parameters. "
                "It is init_state(tx, params, mesh, axis_name) for local gradients, "
                "tx.init(params), replicated, for gradients='mean', and "
                "pmap_replicate(tx.init(params)) for pmap."
            )
