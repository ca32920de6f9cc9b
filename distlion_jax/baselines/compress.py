# SPDX-License-Identifier: Apache-2.0
"""A lossy mean of the workers' gradients: the interface of the baselines, and what they share.

A :class:`Compressor` turns n workers' gradients into one mean, the same on all, and says what that
costs on the wire. :func:`compressed_average` makes an Optax transformation of it: it adds what was
not sent to the next gradient (error feedback), leaves out workers with numbers that are not finite,
and keeps the state. An ordinary optimizer follows: ``optax.chain(compressed_average(QSGD()),
optax.sgd(0.1, momentum=0.9))``.

Compressors whose messages cannot be added up on the way are :class:`Gathered`: every worker
receives all n messages and averages them itself, so that their cost grows with n.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from distlion_jax import checks, wire
from distlion_jax.dense import all_finite
from distlion_jax.ledger import Collective, WireCost, layout_of
from distlion_jax.rules import AxisName, Rules
from distlion_jax.words import Layout

Leaves = list[Array]


class Round(NamedTuple):
    """What a compressor may know of the round it is used in."""

    axis_name: AxisName
    step: Array  # int32[]; the same on all workers: the round
    worker: Array  # int32[]; this worker's index
    weight: Array  # int32[]; 1, or 0 for a worker that sits the round out


class Compressor(abc.ABC):
    """A lossy mean over the workers, and what it costs; see the classes for each method."""

    feedback: ClassVar[bool]  # whether what was not sent is added to the next gradient
    transport: ClassVar[str] = "all_gather"  # how its messages travel, for the ledger

    def init(self, leaves: Sequence[Any]) -> Any:
        """What it remembers from step to step, the same on all workers; nothing by default."""
        del leaves
        return ()

    @abc.abstractmethod
    def mean(self, leaves: Leaves, memory: Any, round_: Round) -> tuple[Leaves, Leaves, Any]:
        """The mean, what went of this worker into it, and the new memory.

        Args:
          leaves: float32, this worker's own; finite unless its weight is 0.
          memory: of :meth:`init`, or of the round before.
          round_: the round.

        Returns:
          The mean over the workers with weight 1 (NaN if there is none; the same on all workers);
          this worker's part, that error feedback takes off; the memory, the same on all workers.
        """

    @abc.abstractmethod
    def collectives(self, layout: Layout, n: int) -> tuple[Collective, ...]:
        """What one round of n workers sends, for leaves of this layout."""

    def cost(self, params: Any, n: int) -> WireCost:
        """Exact wire cost of one round.

        Args:
          params: tree of arrays or ``jax.ShapeDtypeStruct``; only shapes matter.
          n: number of workers.
        """
        layout = layout_of(params)
        return WireCost(self.transport, layout.size, self.collectives(layout, n))


class Gathered(Compressor):
    """A compressor whose messages cannot be summed in transit: all workers receive all of them."""

    @abc.abstractmethod
    def words(self, layout: Layout) -> int:
        """Words of a message."""

    @abc.abstractmethod
    def encode(self, leaves: Leaves, layout: Layout, round_: Round) -> list[Array]:
        """This worker's message in parts: uint32, of any shapes, ``words`` in all."""

    @abc.abstractmethod
    def decode(self, message: Array, layout: Layout) -> Leaves:
        """The leaves that a message, ``uint32[words]``, stands for, in float32."""

    def mean(self, leaves: Leaves, memory: Any, round_: Round) -> tuple[Leaves, Leaves, Any]:
        """Gathers all messages, and averages them one after the other."""
        layout = Layout([x.shape for x in leaves])
        weight = wire.vary(round_.weight.astype(jnp.uint32), round_.axis_name)
        frame = wire.frame([*self.encode(leaves, layout, round_), weight], 1)[0]
        frames = wire.gather(frame, round_.axis_name, (frame.size,))

        def add(total: Leaves, frame: Array) -> tuple[Leaves, None]:
            values = self.decode(frame[:-1], layout)
            pairs = zip(total, values, strict=True)
            return [t + jnp.where(frame[-1] > 0, x, 0) for t, x in pairs], None

        nothing = [jnp.zeros(leaf.shape, jnp.float32) for leaf in layout.leaves]
        total, _ = jax.lax.scan(add, nothing, frames)
        workers = frames[:, -1].sum().astype(jnp.float32)
        return [t / workers for t in total], self.decode(frame[:-1], layout), memory

    def collectives(self, layout: Layout, n: int) -> tuple[Collective, ...]:
        """One all-gather."""
        return (Collective("all-gather", "u32", self.words(layout) + 1, n),)


def to_words(x: Array) -> Array:
    """``float32[...]`` as ``uint32[size]``, bit for bit."""
    return jax.lax.bitcast_convert_type(x.reshape(-1), jnp.uint32)


def to_floats(words: Array) -> Array:
    """``uint32[...]`` as float32 of the same shape, bit for bit."""
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def split_scale(x: Array) -> tuple[Array, Array]:
    """A power of two near the largest absolute value of finite x, and x over it.

    The largest then squares to a number near 1, and results differ by that power of two alone.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), initial=0.0))
    exponent, one = jnp.clip(exponent, -100, 100), jnp.ones([], x.dtype)
    return jnp.ldexp(one, exponent), x * jnp.ldexp(one, -exponent)


class CompressedAverageState(NamedTuple):
    """State of :func:`compressed_average`; one per worker."""

    count: Array  # int32[]; the same on all workers: rounds so far
    error: Any  # float32, the parameters' shapes; differs by worker: what was not sent yet
    memory: Any  # the compressor's own; the same on all workers


def compressed_average(
    compressor: Compressor, axis_name: AxisName = "data"
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces gradients by a lossy mean over the workers, with error feedback where it is due.

    With worker i's gradient g_i, its error e_i (0 at first, and always without feedback) and the
    compressor C:

    .. math::

      p_i = g_i + e_i, \qquad e_i \leftarrow p_i - C(p_i), \qquad
      \bar g = \tfrac{1}{n} \textstyle\sum_i C(p_i)

    Like :func:`distlion_jax.distributed_lion` it needs the worker's *own* gradient, and its state
    lies outside the mapped function with a leading worker axis. A worker whose gradient (with its
    error) has no finite norm in float32 sits the round out, and keeps its error. (No
    health figure shows it; watch for a loss that is not finite.)

    Args:
      compressor: what is sent: :class:`QSGD`, :class:`TernGrad`, :class:`EFSign`, :class:`TopK` or
        :class:`PowerSGD`.
      axis_name: mapped axis, or axes, that the workers lie on.

    Returns:
      A transformation from local gradients to their lossy mean, the same on all workers and in the
      gradients' dtypes. Its extra argument ``participating`` (bool scalar) leaves this worker out;
      when nobody takes part the mean is NaN.

    Raises:
      ValueError: in ``init`` for parameters that are not real; at trace time in ``update`` for an
        unbound axis, gradients already summed over it or not of the parameters' shapes, a state of
        another compressor, or a ``weight``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from distlion_jax.baselines import TopK
      >>> tx = compressed_average(TopK(density=0.5))
      >>> g = jnp.array([[4.0, 1.0], [1.0, -2.0]])  # two workers, who send a number each
      >>> print(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="data")(g)[0])
      [ 2. -1.]
    """
    if not isinstance(compressor, Compressor):
        raise ValueError(
            f"`compressor` must be a Compressor, as QSGD() or PowerSGD(rank=2); got {compressor!r}."
        )
    checks.check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> Any:
        checks.check_params(params, jnp.float32, 0.0)
        error = optax.tree.zeros_like(params, dtype=jnp.float32) if compressor.feedback else ()
        memory = compressor.init(jax.tree.leaves(params))
        return CompressedAverageState(jnp.zeros([], jnp.int32), error, memory)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        participating: ArrayLike = True,
        weight: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params is not None:
            checks.check_like(updates, params)
        if not compressor.feedback and jax.tree.leaves(state.error):
            raise ValueError(
                f"the state has an error that {compressor} would never send: it is of a compressor "
                "with error feedback. Use that one, or initialise anew."
            )
        wanted = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if compressor.feedback:
            checks.check_update(updates, state.error, axis_name)
            wanted = jax.tree.map(jnp.add, wanted, state.error)
        round_ = enter(axis_name, state.count, updates, wanted, participating, weight)
        leaves, treedef = jax.tree.flatten(wanted)
        mean, sent, memory = compressor.mean(leaves, state.memory, round_)
        error = state.error
        if compressor.feedback:
            error = keep(round_, jax.tree.map(jnp.subtract, wanted, treedef.unflatten(sent)), error)
        return as_updates(mean, updates), CompressedAverageState(
            jnp.asarray(optax.safe_increment(state.count)),
            error,
            jax.tree.map(lambda x: wire.vary(x, axis_name), memory),  # as the state is stacked
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def enter(
    axis_name: AxisName,
    count: Array,
    updates: Any,
    wanted: Any,
    participating: ArrayLike,
    weight: ArrayLike | None,
) -> Round:
    """Checks gradients, and decides whether this worker takes part: what it wants has a norm.

    One number of 1e20 has none in float32, and would end in scales and errors that are not finite.
    """
    wire.size(axis_name)
    checks.check_state(count)
    checks.check_local(updates, axis_name)
    if weight is not None:
        raise ValueError("`weight` is for a vote; a compressed average weighs all workers alike.")
    mine = checks.effective_weight(Rules(), participating, None)
    square = sum(jnp.sum(x * x) for x in jax.tree.leaves(wanted))
    mine = jnp.where(jnp.isfinite(square), mine, 0)
    return Round(axis_name, count, jax.lax.axis_index(axis_name), mine)


def keep(round_: Round, new: Any, old: Any) -> Any:
    """The new state of a worker that took part, the old one of a worker that sat out.

    The old one too where the new one is not finite, so that one bad round is not remembered.
    """
    take = (round_.weight > 0) & all_finite(new)
    return jax.tree.map(lambda x, y: jnp.where(take, x, y), new, old)


def as_updates(mean: Leaves, updates: Any) -> Any:
    """Leaves in the structure and dtypes of the gradients."""
    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten([m.astype(g.dtype) for m, g in zip(mean, leaves, strict=True)])
