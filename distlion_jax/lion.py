# SPDX-License-Identifier: Apache-2.0
"""The optimizer: Distributed Lion as Optax transformations.

:func:`scale_by_distributed_lion` holds the maths, in two pure functions around the exchange:
:func:`cast` makes a ballot and the new momentum of a worker's gradient, :func:`apply` makes the
(ascent) direction of the verdict. :func:`distributed_lion` is a chain with no maths of its own:
direction, weight decay, learning rate. Momentum and ballot differ by worker. The direction, and so
the parameters, do not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distlion_jax import _checks as checks
from distlion_jax._rounds import in_rounds, on_shards
from distlion_jax._rules import (
    Aggregation,
    AxisName,
    Rules,
    VoteOptions,
    by_params,
    check_fraction,
    takes_vote_options,
)
from distlion_jax._vote import ballot, stamp, transports, turnout, verdict, wire
from distlion_jax._vote.ballot import Ballot
from distlion_jax._vote.shards import Shards
from distlion_jax._vote.turnout import Round
from distlion_jax._vote.verdict import Verdict, VoteHealth
from distlion_jax.exchanges import Roles

__all__ = ["ScaleByDistributedLionState", "distributed_lion", "scale_by_distributed_lion"]


class ScaleByDistributedLionState(NamedTuple):
    """State of :func:`scale_by_distributed_lion`; one per worker.

    ``update`` takes momentum with a worker axis of size 1 too, as :func:`distlion_jax.unstack`
    leaves it.
    """

    count: Array  # int32[]; the same on all workers: rounds so far, seeds the coins
    mu: optax.Updates  # the parameters' shapes, `mu_dtype`; differs by worker: never sent
    health: VoteHealth | None  # the last round's; None with health="off"
    stamp: Array  # int32[2]; differs by worker: index and number of workers, since its first round
    roles = Roles(
        exchange=True,
        own=("mu", "stamp"),
        shared=("count",),
        like_params=("mu",),
        in_place=("mu",),
        shares_itself=True,
    )

    @classmethod
    def from_momentum(cls, count: ArrayLike, mu: Any) -> "ScaleByDistributedLionState":
        """One worker's state with this momentum, and no round of its own yet."""
        health = verdict.no_health(Rules(), len(jax.tree.leaves(mu)))
        return cls(jnp.asarray(count), mu, health, stamp.blank())


# Makes of gradients and momenta (trees alike) the two trees that a ballot blends. It is told b1,
# the round's number, and of shards how leaves were split.
Prepare = Callable[
    [optax.Updates, optax.Updates, ArrayLike, Array, Shards | None],
    tuple[optax.Updates, optax.Updates],
]


def as_they_are(
    updates: optax.Updates, mu: optax.Updates, b1: ArrayLike, count: Array, shards: Shards | None
) -> Any:
    """Lion's ballot: the sign of the blend itself."""
    del b1, count, shards
    return updates, mu


def cast(
    context: Round,
    updates: optax.Updates,
    mu: optax.Updates,
    b1: ArrayLike,
    b2: ArrayLike,
    prepare: Prepare = as_they_are,
) -> tuple[Ballot, optax.Updates]:
    """Gradient and momentum -> ballot and new momentum; nothing is sent.

    ``delta = sign(b1 mu + (1 - b1) g)``, and ``mu <- b2 mu + (1 - b2) g`` where the worker takes
    part. ``prepare`` replaces what is blended for the ballot, and not what is remembered.
    """
    gradients, treedef = jax.tree.flatten(updates)
    old = treedef.flatten_up_to(mu)
    shaped = [m.reshape(g.shape) for g, m in zip(gradients, old, strict=True)]
    g, m = prepare(updates, treedef.unflatten(shaped), b1, context.count, context.shards)
    signed, with_them = treedef.flatten_up_to(g), treedef.flatten_up_to(m)
    if context.shards is not None:
        signed, with_them = context.shards.ballots(signed), context.shards.ballots(with_them)
    mine = ballot.cast(context, signed, with_them, b1)
    voted = mine.weight > 0

    def remember(g: Array, m: Array) -> Array:
        new = turnout.remember(g.reshape(m.shape), m, b2)
        # `voted` waits for the whole ballot: nobody reads m after, and it is overwritten.
        return jnp.where(voted, new, m)

    return mine, treedef.unflatten([remember(g, m) for g, m in zip(gradients, old, strict=True)])


def apply(context: Round, decided: Verdict, updates: optax.Updates) -> optax.Updates:
    """Verdict -> direction, in the structure and dtypes of the gradients."""
    gradients, treedef = jax.tree.flatten(updates)
    directions = verdict.decode(decided, context, [g.dtype for g in gradients])
    if context.shards is not None:
        directions = context.shards.verdicts(directions, context.rules.aggregation)
    return treedef.unflatten(directions)


@takes_vote_options
def scale_by_distributed_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by a vote of the workers' Lion signs; see :func:`distributed_lion`.

    Returns the direction ``Delta`` with no sign flip, learning rate or weight decay, as Optax's
    ``scale_by_lion`` does.

    Args:
      b1, b2, mu_dtype, axis_name, aggregation: as in :func:`distributed_lion`.
      **options: as listed below.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_distributed_lion(axis_name="data")
      >>> gradients = jnp.array([[1.0, -1.0], [2.0, -3.0], [-1.0, 0.5]])  # 3 workers
      >>> def direction(g):
      ...     return tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(direction, axis_name="data")(gradients)[0])
      [ 1. -1.]
    """
    mu_dtype = check_momenta(b1, b2, mu_dtype)
    rules = Rules(aggregation, **options)
    if axis_name is None:
        return optax.with_extra_args_support(optax.scale_by_lion(b1, b2, mu_dtype))
    return scale_by_vote(rules, b1, b2, mu_dtype, axis_name)


def check_momenta(b1: ArrayLike, b2: ArrayLike, mu_dtype: DTypeLike | None) -> DTypeLike | None:
    """The momentum's dtype as JAX has it; raises for a bad one, and for bad weights."""
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
        checks.check_mu_dtype("`mu_dtype`", mu_dtype)
    return mu_dtype


def scale_by_vote(
    rules: Rules,
    b1: ArrayLike,
    b2: ArrayLike,
    mu_dtype: DTypeLike | None,
    axis_name: AxisName,
    prepare: Prepare = as_they_are,
) -> optax.GradientTransformationExtraArgs:
    """The direction of a vote on the signs of blends that ``prepare`` has made."""

    def init(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype, b2)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        start = verdict.no_health(rules, len(jax.tree.leaves(params)))
        return ScaleByDistributedLionState(jnp.zeros([], jnp.int32), mu, start, stamp.blank())

    def update(
        context: Round, updates: optax.Updates, state: Any, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        del params
        checks.check_workers(context.workers, axis_name, rules)
        checks.check_momentum(updates, state.mu)
        if not context.layout.size:  # nothing to vote on, as for a label that no leaf has
            return turnout.nothing(updates), state
        noise = 0.0 if rules.noise is None else rules.noise
        context = context.only_if(turnout.sane(b1, b2, state.mu, rules.dead_zone, noise))
        direction, mu, health = on_shards(hold, context, updates, state.mu, (b1, b2))
        mu, health = wire.vary_tree((mu, health), axis_name)  # as the state is stacked
        return direction, state._replace(mu=mu, health=health)

    def hold(
        context: Round, updates: optax.Updates, mu: optax.Updates, betas: tuple[Any, Any]
    ) -> tuple[Any, ...]:
        mine, mu = cast(context, updates, mu, *betas, prepare)
        decided = transports.run_round(mine, context)
        health = verdict.health_of(decided, context, mine.weight > 0)
        return apply(context, decided, updates), mu, health

    return in_rounds(init, update, axis_name, rules, split="shards")


@takes_vote_options
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
    **options: Unpack[VoteOptions],
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
    sent. Updates are bit-identical on all workers, whatever the transport. ``update`` needs this
    worker's *own* gradient: under ``jax.shard_map`` with its default replication check use
    :func:`distlion_jax.local_value_and_grad`. Outside the mapped function the state carries a
    leading worker axis; :func:`distlion_jax.init_state` and :func:`distlion_jax.make_train_step`
    take care of it.

    ``update`` takes two extra arguments, each a scalar of this worker alone:

    * ``participating`` (bool): with False this worker casts no vote and keeps its momentum.
    * ``weight`` (integer, needs ``max_weight``): how many votes it has, for example its batch size.
      0 means none, and so does a traced weight outside [0, max_weight].

    A worker with a blend that is not finite casts no vote either. No worker does while ``b1``,
    ``b2``, ``threshold`` or ``noise`` is a traced number out of range, as
    ``optax.inject_hyperparams`` can make it.

    Args:
      learning_rate: step size or schedule. Start majority at Lion's, which is 3 to 10 times below
        AdamW's.
      b1: weight of the momentum in the blend, in [0, 1).
      b2: decay of the momentum, in [0, 1).
      mu_dtype: dtype of the momentum, float32 or bfloat16. None: the parameters' dtype. float16 is
        refused.
      weight_decay: strength or schedule, times the learning rate; 3 to 10 times AdamW's.
      mask: tree, or function of params: True where weight decay applies. As in ``optax.lion``, it
        masks the decay only. :func:`distlion_jax.distributed_lion_by_label` freezes leaves.
      axis_name: mapped axis, or tuple of axes, that the workers lie on. None: one worker, and this
        is ``optax.lion``, exactly; the options below then have no effect.
      aggregation: ``"majority"`` receives 1 or 2 bits a parameter, see ``ties``. ``"average"``
        receives log2(n+1) bits, one more with ternary ballots.
      **options: as listed below.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` must run where ``axis_name`` is
      bound and needs ``params``.

    Raises:
      TypeError: for an option that does not exist.
      ValueError: at construction for a bad value; in ``init`` for parameters that cannot vote. In
        ``update``, at trace time: for an unbound axis, or an axis of one worker; for gradients
        already summed over the axis, or that do not match the state.

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
            b1, b2, mu_dtype, axis_name=axis_name, aggregation=aggregation, **options
        ),
        optax.add_decayed_weights(weight_decay, None if mask is None else by_params(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )
