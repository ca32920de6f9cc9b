# SPDX-License-Identifier: Apache-2.0
"""The optimizer: Distributed Lion as Optax transformations.

:func:`scale_by_distributed_lion` holds the maths: it casts a ballot from the worker's own gradient
and momentum, holds a vote over the axis, and returns the verdict as the (ascent) direction.
:func:`distributed_lion` is a chain with no maths of its own: direction, weight decay, learning
rate. Momentum and the ballot differ by worker; direction, and so the parameters, do not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import ballot as ballots
from distlion_jax import checks, vote, wire
from distlion_jax.health import VoteHealth, health_of, no_health
from distlion_jax.noise import draw
from distlion_jax.rules import (
    Aggregation,
    AxisName,
    Ballot,
    Health,
    Rules,
    Ties,
    Transport,
    check_fraction,
    check_from_zero,
)
from distlion_jax.words import Layout


class ScaleByDistributedLionState(NamedTuple):
    """State of :func:`scale_by_distributed_lion`; one per worker.

    ``update`` takes momentum with a worker axis of size 1 too, as :func:`distlion_jax.unstack`
    leaves it.
    """

    count: Array  # int32[]; the same on all workers: rounds so far, seeds the coins
    mu: optax.Updates  # the parameters' shapes, `mu_dtype`; differs by worker: never sent
    health: VoteHealth | None  # the last round's; None with health="off"


def is_vote(node: Any) -> bool:
    """Whether a node of a transformation's state is that of a vote."""
    return isinstance(node, ScaleByDistributedLionState)


def scale_by_distributed_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    transport: Transport = "auto",
    ties: Ties = "zero",
    ballot: Ballot = "binary",
    threshold: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    max_weight: int | None = None,
    health: Health = "total",
    chunks: int | None = None,
    allow_single_worker: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by a vote of the workers' Lion signs; see :func:`distributed_lion`.

    Returns the direction ``Delta`` with no sign flip, learning rate or weight decay, as Optax's
    ``scale_by_lion`` does; all arguments are :func:`distributed_lion`'s.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_distributed_lion(axis_name="data")
      >>> gradients = jnp.array([[1.0, -1.0], [2.0, -3.0], [-1.0, 0.5]])  # 3 workers
      >>> def direction(g):
      ...     return tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(direction, axis_name="data")(gradients)[0])
      [ 1. -1.]
    """
    rules = Rules(
        aggregation, transport, ties, ballot, max_weight, health, chunks, noise is not None
    )
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
        checks.check_mu_dtype("`mu_dtype`", mu_dtype)
    if threshold is not None and ballot != "ternary":
        raise ValueError(
            f"`threshold` {threshold!r} needs ballot='ternary': one bit a parameter cannot abstain."
        )
    check_from_zero("threshold", threshold)
    check_from_zero("noise", noise)
    if axis_name is None:
        return optax.with_extra_args_support(optax.scale_by_lion(b1, b2, mu_dtype))
    checks.check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype, b2)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        start = no_health(rules, len(jax.tree.leaves(params)))
        return ScaleByDistributedLionState(jnp.zeros([], jnp.int32), mu, start)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        n = wire.size(axis_name)
        checks.check_workers(n, axis_name, allow_single_worker)
        checks.check_weights(rules, n)
        checks.check_state(state.count)
        checks.check_update(updates, state.mu, axis_name)
        local = rules.for_workers(n)
        gradients, treedef = jax.tree.flatten(updates)
        mu = treedef.flatten_up_to(state.mu)
        layout = Layout([x.shape for x in gradients])
        dead_zone = 0.0 if threshold is None else threshold
        weight = checks.effective_weight(rules, participating, weight)
        sane = checks.in_range(b1, b2, dead_zone, 0.0 if noise is None else noise)
        weight, worker = jnp.where(sane, weight, 0), jax.lax.axis_index(axis_name)
        shaped = [m.reshape(g.shape) for g, m in zip(gradients, mu, strict=True)]
        added = None
        if noise is not None:
            added = draw(noise, gradients, shaped, b1, weight, state.count, worker, axis_name)
        mine = ballots.cast(
            layout, gradients, shaped, local, b1, dead_zone, weight, state.count, worker, added
        )
        voted = mine.weight > 0
        verdict = vote.hold(mine, state.count, layout, local, axis_name)
        direction = vote.decode(verdict, layout, local, [x.dtype for x in gradients])

        def remember(g: Array, m: Array) -> Array:
            new = ((1.0 - b2) * g.reshape(m.shape) + b2 * m).astype(m.dtype)
            # `voted` waits for the whole ballot: nobody reads m after, and it is overwritten.
            return jnp.where(voted, new, m)

        new_mu = [remember(g, m) for g, m in zip(gradients, mu, strict=True)]
        figures = health_of(rules, layout, voted, verdict)
        return treedef.unflatten(direction), ScaleByDistributedLionState(
            jnp.asarray(optax.safe_increment(state.count)),
            treedef.unflatten(new_mu),
            jax.tree.map(lambda x: wire.vary(x, axis_name), figures),  # as the state is stacked
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def distributed_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    transport: Transport = "auto",
    ties: Ties = "zero",
    ballot: Ballot = "binary",
    threshold: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    max_weight: int | None = None,
    health: Health = "total",
    chunks: int | None = None,
    allow_single_worker: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Distributed Lion: data-parallel Lion that sends one bit per parameter, and receives one.

    A drop-in for ``optax.lion`` in a step mapped over ``axis_name`` (``jax.shard_map``,
    ``jax.pmap`` or ``jax.vmap``) **without** averaging the gradients first. With n workers, worker
    i with gradient g_i and momentum m_i does, per step t:

    .. math::

      \delta_i &= \mathrm{sign}(\beta_1 m_i + (1 - \beta_1) g_i) \\
      m_i &\leftarrow \beta_2 m_i + (1 - \beta_2) g_i \\
      \Delta &= \mathrm{sign}(\textstyle\sum_i \delta_i) \quad\text{(majority)}, \qquad
      \Delta = \tfrac{1}{n} \textstyle\sum_i \delta_i \quad\text{(average)} \\
      x &\leftarrow x - \alpha_t (\Delta + \lambda x)

    Only the packed delta_i and Delta cross the network. Momentum differs by worker and is never
    sent; updates are bit-identical on all workers, for every transport. Update needs this worker's
    *own* gradient: under ``jax.shard_map`` with its default replication check use
    :func:`distlion_jax.local_value_and_grad`. Outside the mapped function the state carries a
    leading worker axis (:mod:`distlion_jax.mesh` does all this).

    ``update`` takes two extra arguments, each this worker's own scalar: ``participating`` (bool),
    False sits the round out (abstains everywhere, momentum stays); ``weight`` (integer, needs
    ``max_weight``), its say, as in proportion to its batch; 0 sits out, and so does a traced weight
    that is not in [0, max_weight]. A worker with a non-finite blend sits out too, and all do while
    ``b1``, ``b2``, ``threshold`` or ``noise`` is a traced number out of range (as of
    ``optax.inject_hyperparams``).

    Args:
      learning_rate: step size or schedule; start majority at Lion's, 3-10 times below AdamW's.
      b1: weight of the momentum in the blend, in [0, 1).
      b2: decay of the momentum, in [0, 1).
      mu_dtype: float32 or bfloat16; None: the parameters' dtype (float16 is refused).
      weight_decay: strength or schedule, times the learning rate; 3-10 times AdamW's.
      mask: tree or function of params: True where weight decay applies. As in ``optax.lion``, it
        masks the decay only; see :func:`distlion_jax.distributed_lion_by_label` to freeze leaves.
      axis_name: mapped axis, or tuple of axes, that the workers lie on; None: one worker, and
        this is ``optax.lion``, exactly (the options below have no effect).
      aggregation: ``"majority"`` (1 or 2 bits down, see ``ties``) or ``"average"`` (log2(n+1) bits,
        one more with ternary ballots).
      transport: ``"all_gather"``, ``"two_phase"``, ``"psum"`` (uncompressed, for checking), or
        ``"auto"``: the fewest bytes by :func:`distlion_jax.wire_cost`. Same result, bit for bit.
      ties: ``"zero"``: a tied coordinate does not move (the paper's sign(0) = 0; the verdict
        travels as two bits); ``"coin"``: a fair coin of (step, coordinate) decides (one bit, or
        two with ternary ballots).
      ballot: ``"binary"``: 1 bit, and a presence bit per block of 128: a block of exact zeros
        abstains, an isolated zero votes by a fair coin; ``"ternary"``: 2 bits, zeros abstain.
      threshold: ternary only: blends with absolute value up to this abstain.
      noise: None, or how much uniform noise each worker adds to its blends before the sign, in root
        mean squares of the leaf's blends over all workers (2 is a start): votes then count
        magnitudes too, on average, which mends workers with unlike data. Costs an all-reduce of a
        number a leaf.
      max_weight: largest ``weight`` of a worker; None: weights are not in use.
      health: ``"total"``, ``"leaf"`` (figures per leaf, in ``jax.tree.leaves`` order; costs more)
        or ``"off"``: what the state's :class:`VoteHealth` holds of the last round.
      chunks: collectives a phase (None: 1); 8 is quicker under gloo (CPU) on links below 1 Gbit/s,
        where receivers announce themselves behind the data that they send.
      allow_single_worker: whether an axis of size 1 is meant.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` must run where ``axis_name`` is
      bound and needs ``params``.

    Raises:
      ValueError: at construction for a bad option; in ``init`` for parameters that cannot vote; at
        trace time in ``update`` for an unbound axis, an axis of one worker, gradients already
        summed over the axis, or gradients that do not match the state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = distributed_lion(learning_rate=0.1, axis_name="data")
      >>> targets = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, -5.0]])  # one row a worker
      >>> def train(target):
      ...     x = jnp.zeros(2)
      ...     state = tx.init(x)
      ...     for _ in range(3):
      ...         g = jax.grad(lambda x: jnp.sum((x - target) ** 2))(x)
      ...         updates, state = tx.update(g, state, x)
      ...         x = optax.apply_updates(x, updates)
      ...     return x
      >>> print(jax.vmap(train, axis_name="data")(targets)[0].round(3))
      [0.3 0.3]

    References:
      Liu et al, `Communication Efficient Distributed Training with Distributed Lion
      <https://arxiv.org/abs/2404.00438>`_, 2024; Chen et al, `Symbolic Discovery of Optimization
      Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    return optax.chain(
        scale_by_distributed_lion(
            b1,
            b2,
            mu_dtype,
            axis_name=axis_name,
            aggregation=aggregation,
            transport=transport,
            ties=ties,
            ballot=ballot,
            threshold=threshold,
            noise=noise,
            max_weight=max_weight,
            health=health,
            chunks=chunks,
            allow_single_worker=allow_single_worker,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
