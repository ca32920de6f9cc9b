# SPDX-License-Identifier: Apache-2.0
"""Noise before a vote (``optax.add_noise``): every worker draws its own numbers.

In:  a state, without a worker axis. Out: the same, its keys folded with the worker's index.

A state is made once and copied to all workers, keys included. The same noise on all of them would
make their votes unanimous. Keys of other transformations are left as they are: they may be meant to
be the same.
"""

from typing import Any

import jax
import optax

from distlion_jax._vote import wire
from distlion_jax.exchanges import exchanges, is_exchange, is_once


def own_keys(state: Any, axes: tuple[str, ...]) -> Any:
    """The state with this worker's own keys where noise stands before an exchange.

    What follows one must be the same on all workers, and so must its keys. In ``optax.named_chain``
    noise counts as standing before.
    """
    return _walk(state, axes, before=False)


def _walk(node: Any, axes: tuple[str, ...], before: bool) -> Any:
    """``before``: whether an exchange follows this part of a chain."""
    if isinstance(node, optax.AddNoiseState) and before:
        mine = jax.random.fold_in(node.rng_key, wire.worker(axes))
        return node._replace(rng_key=mine)
    if is_exchange(node) or is_once(node) or not isinstance(node, tuple | list | dict):
        return node
    if isinstance(node, optax.transforms.PartitionState):  # groups of leaves, side by side
        groups = node.inner_states.items()
        return node._replace(inner_states={k: _walk(x, axes, before) for k, x in groups})
    if isinstance(node, dict):  # optax.named_chain, whose order JAX does not keep: it sorts names
        follows = before or bool(exchanges(node))
        return {name: _walk(child, axes, follows) for name, child in node.items()}
    holds = [bool(exchanges(child)) for child in node]
    chain = not hasattr(node, "_fields")
    parts = []
    for i, child in enumerate(node):
        passed = chain and any(holds[:i])
        follows = before or (chain and any(holds[i + 1 :]))
        parts.append(child if passed else _walk(child, axes, follows))
    make: Any = type(node)
    return make(parts) if chain else make(*parts)
