# SPDX-License-Identifier: Apache-2.0
"""Random keys in a transformation's state, before the vote: every worker draws its own numbers.

In:  a state, without a worker axis. Out: the same, its keys folded with the worker's index.

A state is made once and copied to all workers, keys included. Noise before a vote
(``optax.add_noise``) would be the same on all of them, and their votes unanimous.
"""

from typing import Any

import jax
import optax

from distlion_jax._vote import wire
from distlion_jax.exchanges import is_exchange, is_once


def _has_key(node: Any) -> bool:
    return isinstance(node, optax.AddNoiseState) or is_exchange(node) or is_once(node)


def own_keys(state: Any, axes: tuple[str, ...]) -> Any:
    """The state with keys of this worker's own, in what stands before the last exchange.

    What follows the exchange must be the same on all workers, and so must its keys.
    """
    nodes, treedef = jax.tree.flatten(state, is_leaf=_has_key)
    last = max((i for i, node in enumerate(nodes) if is_exchange(node)), default=-1)

    def fold(key: Any) -> Any:
        return jax.random.fold_in(key, wire.worker(axes)) if wire.is_key(key) else key

    def one(i: int, node: Any) -> Any:
        if i >= last or is_exchange(node) or is_once(node):
            return node
        if isinstance(node, optax.AddNoiseState):
            key = node.rng_key  # typed, or the two words of old
            mine = jax.random.fold_in(key, wire.worker(axes))
            return node._replace(rng_key=mine)
        return fold(node)

    return treedef.unflatten([one(i, node) for i, node in enumerate(nodes)])
