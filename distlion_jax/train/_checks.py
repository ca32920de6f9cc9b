# SPDX-License-Identifier: Apache-2.0
"""What is wrong with what a train step was given, said before it runs.

In:  the batch, state and extra arguments of a step (shapes and types).
Out: nothing, or a ``ValueError``. What ``update`` is given is checked in ``distlion_jax._checks``.
"""

import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from distlion_jax._vote import wire
from distlion_jax.exchanges import exchanges, roles_of


def check_averaged(state: Any) -> None:
    """Raises for a vote on gradients that the step has averaged: it would save nothing."""
    if exchanges(state):
        raise ValueError(
            "`tx` holds a vote or an average over the workers, and gradients='mean' averages "
            "before it. Use gradients='local'."
        )


def check_batch(batch: Any, n: int, parts: int = 1) -> None:
    """Raises unless every leaf has as many rows as the first, which n workers can share.

    Each of them takes its rows in so many parts of equal size.
    """
    first = None
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        rows = np.shape(x)[0] if np.ndim(x) else 0
        first = rows if first is None else first
        if rows != first:
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has {rows} rows, the leaves before it "
                f"{first}: they are not of the same examples."
            )
        if rows == 0 or rows % (n * parts):
            shares = f"{n} workers" + (f" in {parts} micro-batches" if parts > 1 else "")
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` has {rows} rows, which {shares} cannot "
                f"share equally. Use a multiple of {n * parts}, or drop the remainder of the data."
            )


def check_global(batch: Any, several: bool) -> None:
    """Raises for rows of one process where a batch of all processes is meant."""
    if not several:
        return
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        concrete = isinstance(x, np.ndarray | jax.Array) and not isinstance(x, Tracer)
        if concrete and getattr(x, "is_fully_addressable", True):
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` is an array of this process alone, and the "
                f"step is of {jax.process_count()} processes: half of the rows, or more, would be "
                "dropped. Each process passes the rows that it has loaded through "
                "distlion_jax.make_global_batch(rows, mesh), which makes one array of all."
            )
        sharding: Any = getattr(x, "sharding", None)
        if concrete and not rows_are_apart(sharding, x.shape):
            raise ValueError(
                f"`batch{jax.tree_util.keystr(path)}` claims to be the same on several processes "
                f"(its sharding is {sharding}): rows that they do not share would be dropped. "
                "Split its leading axis over all of the step's axes, as "
                "distlion_jax.make_global_batch(rows, mesh, axes) does."
            )


@functools.lru_cache
def rows_are_apart(sharding: Any, shape: tuple[int, ...]) -> bool:
    """Whether no row lies on devices of two processes."""
    owners: dict[tuple[Any, Any], int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        key = index[0].start, index[0].stop
        if owners.setdefault(key, device.process_index) != device.process_index:
            return False
    return True


def check_by_worker(name: str, tree: Any, n: int, cure: str) -> None:
    """Raises unless every leaf has a leading axis of the workers."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if np.shape(x)[:1] != (n,):
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` has shape {np.shape(x)}; a leading axis "
                f"of {n}, one entry a worker, was expected. {cure}"
            )


def check_places(params: Any, state: Any, batch: Any) -> None:
    """Raises for arguments that were swapped, as far as a state can be told from the others."""
    for name, tree in (("params", params), ("batch", batch)):
        if exchanges(tree):
            raise ValueError(
                f"`{name}` holds a transformation's state: arguments are swapped. The order is "
                "step(params, state, batch), or step(params, model_state, state, batch) with "
                "has_model_state=True."
            )


def check_devices(devices: Collection[Any], **trees: Any) -> None:
    """Raises for an array that was put on other devices than the step's."""
    wanted = set(devices)
    for name, tree in trees.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.committed:
                continue
            if x.sharding.device_set != wanted:
                raise ValueError(
                    f"`{name}{jax.tree_util.keystr(path)}` lies on {len(x.sharding.device_set)} "
                    f"devices, and the step runs on {len(wanted)}, not the same ones. "
                    "replicate(params, mesh) and resize_state(state, mesh) put them there."
                )


def check_alive(**trees: Any) -> None:
    """Raises for an array whose buffer was given away; JAX's own check can be too late."""

    def gone(x: Any) -> bool:
        return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted()

    for name, tree in trees.items():
        if not any(map(gone, jax.tree.leaves(tree))):
            continue
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if gone(x):
                raise ValueError(
                    f"`{name}{jax.tree_util.keystr(path)}` was donated to an earlier step, and its "
                    "buffer is gone. Go on with what that step returned; or make the step with "
                    "donate=False, which keeps its arguments."
                )


CONDITIONAL = (
    optax.ApplyIfFiniteState,
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.MultiStepsState,
)


def _conditions(state: Any) -> Iterator[Any]:
    """The states of all transformations that may skip an exchange inside them."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, CONDITIONAL)):
        if isinstance(node, CONDITIONAL):
            multi = isinstance(node, optax.MultiStepsState)
            inner = node.inner_opt_state if multi else node.inner_state
            if exchanges(inner):
                yield node
                yield from _conditions(inner)


def check_unconditional(state: Any) -> None:
    """Raises for an exchange that each worker would hold, or not, by its own numbers.

    Those who wait for one that does not come wait for ever.
    """
    for node in _conditions(state):
        if isinstance(node, optax.ApplyIfFiniteState):
            name = "optax.apply_if_finite"
        elif isinstance(node, optax.MultiStepsState) and jax.tree.leaves(node.skip_state):
            name = "the should_skip_update_fn of optax.MultiSteps"
        else:
            continue
        raise ValueError(
            f"`tx` holds a vote or an average inside {name}, which lets each worker decide by its "
            "own numbers whether to hold it: the others would wait for ever. Leave it out: a "
            "worker with numbers that are not finite sits the round out by itself."
        )


def check_decided_alike(state: Any) -> None:
    """Raises for an exchange in a branch that arguments of a worker's own could decide."""
    kinds = (optax.ConditionallyMaskState, optax.ConditionallyTransformState)
    if any(isinstance(node, kinds) for node in _conditions(state)):
        raise ValueError(
            "`tx` holds a vote or an average inside optax.conditionally_transform (or _mask), and "
            "the step was given arguments of each worker's own: those that skip it would leave the "
            "others waiting for ever. Decide by the step's number alone."
        )


def stands_side_by_side(state: Any) -> bool:
    """Whether exchanges of some leaves each stand side by side, as in ``optax.partition``."""
    is_partition = lambda x: isinstance(x, optax.transforms.PartitionState)  # noqa: E731
    groups = [
        group
        for node in jax.tree.leaves(state, is_leaf=is_partition)
        if is_partition(node)
        for group in node.inner_states.values()
    ]
    return sum(bool(exchanges(group)) for group in groups) > 1 or any(
        stands_side_by_side(group) for group in groups
    )


def check_differ(axes: tuple[str, ...], state: Any, params: Any) -> None:
    """Raises, under JAX's check, for parameters that JAX knows to differ by worker after a step."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not wire.varying_axes(x).isdisjoint(axes):
            keeping = _undeclared(state)
            kept = f" {', '.join(keeping)} keep arrays: wrap them." if keeping else ""
            raise ValueError(
                f"`params{jax.tree_util.keystr(path)}` would differ by worker after this step, as "
                "far as JAX can see. A leaf that is masked, frozen by optax.set_to_zero, or passed "
                "on as it is, keeps the worker's own gradient: freeze it with "
                'distributed_lion_by_label ("frozen"), or with optax.freeze after a vote on all '
                "leaves. What follows a vote and keeps arrays belongs in "
                f"distlion_jax.replicated(...).{kept} An ordinary optimizer needs "
                "gradients='mean', or average_gradients before it. With check_vma=False the step "
                "compares the replicas' bits instead."
            )


def _undeclared(node: Any) -> list[str]:
    """Names of the states that keep arrays, and say of none that it is the same on all workers."""
    roles = roles_of(node)
    if roles is not None and (roles.exchange or roles.once):
        return []
    if not hasattr(node, "_fields"):
        children = node.values() if isinstance(node, dict) else node
        inside = children if isinstance(node, dict | list | tuple) else ()
        return sorted({name for child in inside for name in _undeclared(child)})
    named = (*roles.own, *roles.shared) if roles else ()
    found: set[str] = set()
    for field in set(node._fields) - set(named):
        child = getattr(node, field)
        deeper = _undeclared(child)
        has_states = any(hasattr(x, "_fields") for x in jax.tree.leaves(child, is_leaf=_is_state))
        found |= set(deeper) if has_states else set()
        found |= {type(node).__name__} if jax.tree.leaves(child) and not has_states else set()
    return sorted(found)


def _is_state(node: Any) -> bool:
    return hasattr(node, "_fields")


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


UNFIT = (
    ": the state does not fit the parameters. It is init_state(tx, params, mesh, axis_name) for "
    "local gradients, tx.init(params), replicated, for gradients='mean', and "
    "pmap_replicate(tx.init(params)) for pmap."
)


def check_shapes(name: str, old: Any, new: Any, cure: str = UNFIT) -> None:
    """Raises where a step changed the structure, or shapes: what does not fit was broadcast."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        before, after = (
            {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (old, new)
        )
        changed = min(before ^ after, default="")
        raise ValueError(
            f"`{name}{changed}` is there before or after `tx.update` only: the structure changes, "
            "and a compiled step cannot carry it on. optax.monitor does this: use optax.snapshot, "
            "or let loss_fn return the figure as aux."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    for (path, before), after in pairs:
        if np.shape(before) != np.shape(after):
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` would change shape in the step, from "
                f"{np.shape(before)} to {np.shape(after)}{cure}"
            )
