# SPDX-License-Identifier: Apache-2.0
"""Votes of orthogonalised ballots that were tried beside distributed_muon, and are not in it.

Only to be compared with, under ``jax.vmap``: they sum dense votes, where a vote sends bits.

* :func:`owner_momentum`: the ballots are averaged by whoever owns a slice of the parameters. The
  owner keeps the one momentum of the whole job and orthogonalises it once, 1/n of the work and
  memory each, and one bit comes down.
* :func:`fed_back`: what a ballot's sign left out is added to the next one.
* :func:`in_blocks`: a matrix is orthogonalised in four blocks, as devices would that each have one.
* :func:`cautious`: weight decay only where it points the way of the verdict.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import distlion_jax as dl
from distlion_jax._batches import batch_of, numbers_of, orthogonalised
from distlion_jax._orthogonal import newton_schulz
from distlion_jax.exchanges import Roles

NS_STEPS = 5
BETAS = (0.5, 0.9)  # of the workers, of owner_momentum
OWNER = 0.8  # decay of its owners' momentum
FEEDBACK = 0.5
BLOCKS = 2  # along each side of a matrix
LENGTHS = (0.2, 0.5)  # of its steps: of hidden matrices, of the rest

Chosen = Callable[[Any], Any]


class TriedState(NamedTuple):
    """State of :func:`owner_momentum` and :func:`fed_back`."""

    mu: optax.Updates  # differs by worker
    error: optax.Updates  # differs by worker: what is added to the next ballot
    owned: optax.Updates  # the same on all workers; in a real job each owns a slice
    roles = Roles(exchange=True, own=("mu", "error"), shared=("owned",))


def _whole(x: Array, numbers: Any) -> Array:
    """A leaf with its matrices orthogonalised."""
    return orthogonalised(x, numbers, NS_STEPS, jnp.float32)


def _orthogonal(tree: Any, chosen: Chosen, each: Callable[[Array, Any], Array] = _whole) -> Any:
    """The tree, with its hidden matrices orthogonalised."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, numbers_of(chosen, tree), strict=True)
    return treedef.unflatten([x if one is None else each(x, one) for x, one in pairs])


def _init(params: optax.Params) -> TriedState:
    return TriedState(*(optax.tree.zeros_like(params) for _ in range(3)))


_mix = functools.partial(optax.tree.update_moment, order=1)  # (1 - decay) * x + decay * y


def _ballots(blends: Any, error: Any) -> tuple[Any, Any]:
    """Signs of blends with what the last ones left out, and what these leave out."""
    ballots = jax.tree.map(jnp.add, blends, error)
    signs = jax.tree.map(jnp.sign, ballots)

    def left_out(p: Array, sign: Array) -> Array:
        return FEEDBACK * (p - jnp.mean(jnp.abs(p)) * sign)

    return signs, jax.tree.map(left_out, ballots, signs)


def _chain(direction: Any, rate: Any, decay: Any) -> Any:
    return optax.chain(
        direction, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate)
    )


def owner_momentum(
    rate: Any, b1: Any = BETAS[0], b2: Any = BETAS[1], *, weight_decay: Any, chosen: Chosen
) -> optax.GradientTransformation:
    """Ballots of plain signs with error feedback; their mean goes through momentum and NS."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TriedState]:
        del params
        signs, error = _ballots(_mix(updates, state.mu, b1), state.error)
        mean = jax.lax.pmean(signs, "data")
        owned = _mix(mean, state.owned, OWNER)
        direction = jax.tree.map(jnp.sign, _orthogonal(_mix(mean, owned, OWNER), chosen))
        leaves, treedef = jax.tree.flatten(direction)
        numbers = numbers_of(chosen, direction)
        lengths = [LENGTHS[one is None] for one in numbers]
        direction = treedef.unflatten([s * d for s, d in zip(lengths, leaves, strict=True)])
        return direction, TriedState(_mix(updates, state.mu, b2), error, owned)

    return _chain(optax.GradientTransformation(_init, update), rate, weight_decay)


def fed_back(
    rate: Any, b1: Any = 0.8, b2: Any = 0.9, *, weight_decay: Any, chosen: Chosen
) -> optax.GradientTransformation:
    """distributed_muon, with error feedback on what is signed."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TriedState]:
        del params
        signs, error = _ballots(_orthogonal(_mix(updates, state.mu, b1), chosen), state.error)
        direction = jax.tree.map(jnp.sign, jax.lax.psum(signs, "data"))
        return direction, TriedState(_mix(updates, state.mu, b2), error, state.owned)

    return _chain(optax.GradientTransformation(_init, update), rate, weight_decay)


def _orthogonal_blocks(x: Array, numbers: Any) -> Array:
    """A leaf with blocks of its matrices orthogonalised, each alone."""
    batch = batch_of(x.shape, numbers)
    many, rows, columns = batch.shape
    split = (many, BLOCKS, rows // BLOCKS, BLOCKS, columns // BLOCKS)
    parts = batch.of(x).reshape(split).swapaxes(2, 3)
    done = newton_schulz(parts.reshape(-1, *parts.shape[-2:]), NS_STEPS, jnp.float32)
    return batch.back(done.reshape(parts.shape).swapaxes(2, 3).reshape(batch.shape))


def in_blocks(
    rate: Any, b1: Any = 0.8, b2: Any = 0.9, *, weight_decay: Any, chosen: Chosen
) -> optax.GradientTransformation:
    """distributed_muon, whose matrices are orthogonalised in blocks: no device needs another's."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, TriedState]:
        del params
        blocks = _orthogonal(_mix(updates, state.mu, b1), chosen, _orthogonal_blocks)
        signs = jax.tree.map(jnp.sign, blocks)
        direction = jax.tree.map(jnp.sign, jax.lax.psum(signs, "data"))
        return direction, state._replace(mu=_mix(updates, state.mu, b2))

    return _chain(optax.GradientTransformation(_init, update), rate, weight_decay)


def cautious(
    rate: Any, b1: Any = 0.8, b2: Any = 0.9, *, weight_decay: Any, chosen: Chosen
) -> optax.GradientTransformation:
    """distributed_muon, with weight decay only where verdict and parameter have one sign.

    The idea is that of cautious weight decay, where the update already shrinks the parameter.
    """

    def decayed(updates: Any, params: Any) -> Any:
        def one(u: Array, x: Array) -> Array:
            return u + jnp.where(u * x > 0, weight_decay * x, 0.0)

        return jax.tree.map(one, updates, params)

    vote = dl.scale_by_distributed_muon(
        b1, b2, muon_weight_dimension_numbers=chosen, transport="all_gather", health="off"
    )
    return optax.chain(vote, optax.stateless(decayed), optax.scale_by_learning_rate(rate))
