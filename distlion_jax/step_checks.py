# SPDX-License-Identifier: Apache-2.0
"""What is wrong with what a train step was given, said before it runs.

In:  the batch, state and extra arguments of a step (shapes and types).
Out: nothing, or a ``ValueError``. What ``update`` is given is checked in :mod:`checks`.
"""

from typing import Any

import jax
import numpy as np

from distlion_jax.baselines.compress import CompressedAverageState
from distlion_jax.baselines.top_k import DeepGradientCompressionState
from distlion_jax.dense import AverageGradientsState, ScaleByAveragedLionState
from distlion_jax.lion import ScaleByDistributedLionState

EXCHANGES = (  # states of what makes workers agree
    ScaleByDistributedLionState,
    ScaleByAveragedLionState,
    AverageGradientsState,
    CompressedAverageState,
    DeepGradientCompressionState,
)


def _holds(state: Any, kinds: tuple[type, ...]) -> bool:
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    return any(map(is_one, jax.tree.leaves(state, is_leaf=is_one)))


def check_replicated(state: Any) -> None:
    """Raises for a state that is not the same on all workers."""
    if _holds(state, EXCHANGES):
        raise ValueError(
            "`tx` holds a vote or an average over the workers, whose state is each worker's own. "
            "replicated(...) is for what follows it: optax.chain(compressed_average(...), "
            "replicated(optax.adamw(...)))."
        )


def check_averaged(state: Any) -> None:
    """Raises for a vote on gradients that the step has averaged: full precision, for theatre."""
    if _holds(state, EXCHANGES):
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


def check_exchange(state: Any) -> None:
    """Raises for a transformation that sends nothing, where JAX would not see replicas part."""
    if not _holds(state, EXCHANGES):
        raise ValueError(
            "`tx` holds no vote and no average over the workers: each would go its own way on its "
            "local gradient, in silence. Use distributed_lion, put average_gradients before it, or "
            "use make_train_step with gradients='mean' (or with check_vma=True, where JAX checks)."
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
