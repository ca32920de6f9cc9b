# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion with orthogonalised ballots: Muon's direction at one bit per parameter.

Before its sign is taken, each worker's blend of a hidden matrix is orthogonalised, as Muon does
with the momentum. Only what is signed changes: the wire, the vote, the state and the rule for who
takes part are :func:`distlion_jax.distributed_lion`'s.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from optax.contrib import MuonDimensionNumbers

from distlion_jax import _checks as checks
from distlion_jax._batches import (
    Choice,
    axes_of,
    numbers_of,
    orthogonalised,
    steps_and_period,
)
from distlion_jax._promotion import default_promotion
from distlion_jax._rules import (
    Aggregation,
    AxisName,
    Rules,
    VoteOptions,
    by_params,
    check_from_zero,
    takes_vote_options,
)
from distlion_jax._vote.shards import Shards
from distlion_jax._vote.turnout import blend, remember
from distlion_jax.lion import Prepare, check_momenta, scale_by_vote

__all__ = ["distributed_muon", "scale_by_distributed_muon"]


def _orthogonalised(chosen: Choice, steps: int, dtype: DTypeLike, period: int) -> Prepare:
    """Gradient and momentum of a hidden matrix are both replaced by its orthogonalised blend.

    The ballot blends them again. A blend of two equal numbers has their sign, and is not finite
    where they are not.
    """

    def prepare(
        updates: Any, mu: Any, b1: ArrayLike, count: Array, shards: Shards | None
    ) -> tuple[Any, Any]:
        gradients, treedef = jax.tree.flatten(updates)
        momenta = treedef.flatten_up_to(mu)
        numbers = numbers_of(chosen, _whole(shards, updates))
        hidden = {i: n for i, n in enumerate(numbers) if n is not None and gradients[i].size}
        blends = [blend(gradients[i], momenta[i], b1) for i in hidden]

        def orthogonalise() -> list[Array]:
            return [one_leaf(c, i, hidden[i]) for c, i in zip(blends, hidden, strict=True)]

        def one_leaf(c: Array, i: int, numbers: MuonDimensionNumbers) -> Array:
            if shards is None:
                return orthogonalised(c, numbers, steps, dtype)
            axes = axes_of(numbers)  # stacks stay split: each device has its own layers
            whole = orthogonalised(shards.joined(c, i, axes), numbers, steps, dtype)
            return shards.part(whole, i, axes)

        if period == 1 or not hidden:
            signed = orthogonalise()
        else:  # the same branch on all devices of a worker; to other workers it sends nothing
            signed = jax.lax.cond(count % period == 0, orthogonalise, lambda: blends)
        for i, c in zip(hidden, signed, strict=True):
            gradients[i] = momenta[i] = c
        return treedef.unflatten(gradients), treedef.unflatten(momenta)

    return prepare


def _whole(shards: Shards | None, updates: Any) -> Any:
    """The updates, or the shapes of the whole leaves of which they are shards."""
    if shards is None:
        return updates
    leaves, treedef = jax.tree.flatten(updates)
    pairs = zip(shards.whole.leaves, leaves, strict=True)
    return treedef.unflatten([jax.ShapeDtypeStruct(leaf.shape, x.dtype) for leaf, x in pairs])


def _alone(
    b1: ArrayLike, b2: ArrayLike, mu_dtype: DTypeLike | None, prepare: Prepare
) -> optax.GradientTransformationExtraArgs:
    """One worker without an axis, with the state of ``optax.lion``."""
    lion = optax.scale_by_lion(b1, b2, mu_dtype)

    def init(params: optax.Params) -> Any:
        checks.check_params(params, mu_dtype, b2)
        return lion.init(params)

    @default_promotion
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        signed = prepare(updates, state.mu, b1, state.count, None)
        direction = jax.tree.map(
            lambda g, x, m: jnp.sign(blend(x, m, b1)).astype(g.dtype), updates, *signed
        )
        mu = jax.tree.map(lambda g, m: remember(g, m, b2), updates, state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return direction, optax.ScaleByLionState(count, mu)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


@takes_vote_options
def scale_by_distributed_muon(
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int | None = None,
    ns_dtype: DTypeLike | None = None,
    period: int | None = None,
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by a vote of orthogonalised signs; see :func:`distributed_muon`.

    Returns the direction ``Delta`` with no sign flip, learning rate or weight decay.

    Args:
      b1, b2, mu_dtype, axis_name, aggregation: as in :func:`distlion_jax.distributed_lion`.
      muon_weight_dimension_numbers, ns_steps, ns_dtype, period: as in :func:`distributed_muon`.
      **options: as listed below.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tx = scale_by_distributed_muon(axis_name="data")
      >>> g = jnp.array([[[2.0, 1.0], [1.0, 2.0]]] * 3)  # of 3 workers; its U V^T is 1
      >>> def direction(g):
      ...     return tx.update(g, tx.init(g))[0]
      >>> print(jax.vmap(direction, axis_name="data")(g)[0])
      [[ 1. -1.]
       [-1.  1.]]
    """
    mu_dtype = check_momenta(b1, b2, mu_dtype)
    rules = Rules(aggregation, **options)
    steps, period = steps_and_period(ns_steps, period)
    if rules.threshold is not None and period > 1:
        raise ValueError(
            f"`threshold` {rules.threshold!r} is in units of what is signed, which `period` "
            f"{period} changes from round to round. Leave one of them out."
        )
    chosen, dtype = muon_weight_dimension_numbers, _ns_dtype(ns_dtype)
    prepare = _orthogonalised(chosen, steps, dtype, period)
    if axis_name is None:
        tx = _alone(b1, b2, mu_dtype, prepare)
    else:
        tx = scale_by_vote(rules, b1, b2, mu_dtype, axis_name, prepare)

    def init(params: optax.Params) -> Any:
        numbers_of(chosen, params)  # raises here for what does not fit, not at the first update
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _ns_dtype(given: Any) -> DTypeLike:
    """The dtype that matrices are orthogonalised in."""
    try:
        dtype = jnp.dtype(jnp.float32 if given is None else given)
    except TypeError:  # no dtype, or an array: what optax.inject_hyperparams makes of one
        dtype = None
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(
            f"`ns_dtype` must be jnp.float32, jnp.bfloat16 or jnp.float64; got {given!r}. With "
            "optax.inject_hyperparams, name it in static_args=('ns_dtype',)."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def _scale_others(factor: ArrayLike, chosen: Choice) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of all leaves but hidden matrices; by 0 if a traced factor is bad."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        numbers, number = numbers_of(chosen, updates), jnp.asarray(factor)
        number = jnp.where((number >= 0) & (number < jnp.inf), number, 0)
        scaled = [
            u * number.astype(u.dtype) if one is None else u
            for u, one in zip(leaves, numbers, strict=True)
        ]
        return treedef.unflatten(scaled)

    return optax.with_extra_args_support(optax.stateless(scale))


@takes_vote_options
def distributed_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.9,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    axis_name: AxisName | None = "data",
    aggregation: Aggregation = "majority",
    muon_weight_dimension_numbers: Choice = None,
    ns_steps: int | None = None,
    ns_dtype: DTypeLike | None = None,
    period: int | None = None,
    rest_factor: ArrayLike | None = None,
    **options: Unpack[VoteOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Distributed Lion with orthogonalised ballots: one bit per parameter, Muon's direction.

    As :func:`distlion_jax.distributed_lion`, but each worker orthogonalises the blend of every
    hidden matrix, by a few steps of Newton and Schulz, before it takes the sign. With n workers,
    worker i with gradient g_i and momentum m_i does, per step t:

    .. math::

      c_i &= \beta_1 m_i + (1 - \beta_1) g_i \\
      \delta_i &= \mathrm{sign}(\mathrm{NS}(c_i)) \text{ for a hidden matrix}, \quad
      \mathrm{sign}(c_i) \text{ for all other leaves} \\
      m_i &\leftarrow \beta_2 m_i + (1 - \beta_2) g_i \\
      x &\leftarrow x - \alpha_t (\mathrm{sign}(\textstyle\sum_i \delta_i) + \lambda x)

    where :math:`\mathrm{NS}(U S V^T) \approx U V^T`. The same bits travel as in Distributed Lion,
    and the state is the same. NS is each worker's own affair: workers whose devices round it
    differently still agree on every parameter, since only votes are sent. (Devices that average
    inside a node, ``mean_axis_name``, stand for one worker. They must round alike, as devices of
    one kind do.)

    Zeros stay zeros: a matrix of zeros (frozen, or not yet used), its rows and its columns. They
    abstain as in ``distributed_lion``, by blocks of 128 or with ``ballot="ternary"`` one by one.
    ``threshold`` and ``noise`` are of what is signed: an orthogonalised matrix has a root mean
    square of about ``1 / sqrt(larger side)``.

    NS costs arithmetic, not bytes: about ``5 r / B`` of a step, for square matrices of side r and B
    tokens a worker and step. ``ns_steps`` and ``period`` make it cheaper.

    Args:
      learning_rate: step size or schedule. Begin at 1e-2 with a weight decay of 0.4.
      b1: weight of the momentum in the blend, in [0, 1).
      b2: decay of the momentum, in [0, 1).
      mu_dtype, weight_decay, mask, aggregation: as in ``distributed_lion``.
      axis_name: mapped axis, or tuple of axes, that the workers lie on. None: one worker, with the
        state of ``optax.lion``. It does not guard itself against numbers that are not finite, and
        the options of a vote have no effect.
      muon_weight_dimension_numbers: which leaves are hidden matrices, as in
        ``optax.contrib.muon``: a tree of ``optax.contrib.MuonDimensionNumbers`` and of None for
        the other leaves, a prefix of one, or a function of the parameters that returns one. Axes
        that are not named count a matrix each, as heads do in ``MuonDimensionNumbers(0, 2)`` of
        ``[width, heads, features]``. None: :func:`distlion_jax.hidden_matrices`, which leaves
        embeddings and heads out; Optax's own rule takes all leaves of two axes. With
        ``optax.inject_hyperparams``, name a function in its ``static_args``.
      ns_steps: steps of Newton and Schulz; None: 5.
      ns_dtype: what they are computed in; None: float32. In bfloat16 more signs are lost the nearer
        a matrix is to a low rank, whose other directions are rounding: at rank 1 a third of them.
      period: orthogonalise in one round of so many, the first included, and take plain signs in
        the others; None: 1.
      rest_factor: learning rate of the leaves that are no hidden matrix, in units of the other;
        None: 1.
      **options: as listed below.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, used as ``distributed_lion``'s.

    Raises:
      TypeError: for an option that does not exist.
      ValueError: as ``distributed_lion``; and for dimension numbers that do not fit a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = distributed_muon(learning_rate=0.1, axis_name="data")
      >>> targets = jnp.stack([jnp.eye(2), 2 * jnp.eye(2), jnp.ones((2, 2))])  # of 3 workers
      >>> def train(target):
      ...     x = jnp.zeros((2, 2))
      ...     state = tx.init(x)
      ...     for _ in range(3):
      ...         g = jax.grad(lambda x: jnp.sum((x - target) ** 2))(x)
      ...         updates, state = tx.update(g, state, x)
      ...         x = optax.apply_updates(x, updates)
      ...     return x
      >>> print(jax.vmap(train, axis_name="data")(targets)[0].round(3).diagonal())
      [0.3 0.3]

    References:
      Liu et al, `Communication Efficient Distributed Training with Distributed Lion
      <https://arxiv.org/abs/2404.00438>`_, 2024; Jordan et al, `Muon: An optimizer for hidden
      layers in neural networks <https://kellerjordan.github.io/posts/muon/>`_, 2024; `SignMuon
      <https://arxiv.org/abs/2605.16311>`_, 2026, which signs the orthogonalised momentum
    """
    check_from_zero("rest_factor", rest_factor)
    chosen = muon_weight_dimension_numbers
    scaled = () if rest_factor is None else (_scale_others(rest_factor, chosen),)
    return optax.chain(
        scale_by_distributed_muon(
            b1,
            b2,
            mu_dtype,
            axis_name=axis_name,
            aggregation=aggregation,
            muon_weight_dimension_numbers=chosen,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            period=period,
            **options,
        ),
        optax.add_decayed_weights(weight_decay, None if mask is None else by_params(mask)),
        *scaled,
        optax.scale_by_learning_rate(learning_rate),
    )
