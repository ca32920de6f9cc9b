# SPDX-License-Identifier: Apache-2.0
"""A lossy mean of the workers' gradients: the interface of the baselines, and what they share.

A :class:`Compressor` turns n workers' gradients into one mean, the same on all, and says what that
costs on the wire. :func:`compressed_average` makes an Optax transformation of it. It adds what was
not sent to the next gradient (error feedback), leaves out workers with numbers that are not finite,
and keeps the state. An ordinary optimizer follows: ``optax.chain(compressed_average(QSGD()),
replicated(optax.sgd(0.1, momentum=0.9)))``.

Where messages cannot be added up on the way, the compressor is :class:`Gathered`: every worker
receives all n messages and averages them itself. Its cost grows with n.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from distlion_jax import _checks as checks
from distlion_jax._rounds import in_rounds
from distlion_jax._rules import AxisName
from distlion_jax._vote import frames, wire
from distlion_jax._vote.stamp import blank
from distlion_jax._vote.turnout import (
    MeanHealth,
    Round,
    all_finite,
    as_held,
    finite_norm,
    no_mean,
    nothing,
)
from distlion_jax._vote.words import Layout
from distlion_jax.exchanges import Roles
from distlion_jax.ledger import Collective, WireCost, layout_of

Leaves = list[Array]


class Averaged(NamedTuple):
    """What a compressor makes of a round."""

    mean: Leaves  # over the workers that take part; NaN if none does; the same on all workers
    sent: Leaves  # what this worker's message stands for; the rest of its leaves is the new error
    memory: Any  # the compressor's own; the same on all workers
    workers: Array  # int32[]: how many took part; the same on all workers


class Compressor(abc.ABC):
    """A lossy mean over the workers, and what it costs; see the classes for each method."""

    feedback: ClassVar[bool]  # whether what was not sent is added to the next gradient
    transport: ClassVar[str] = "all_gather"  # how its messages travel, for the ledger

    def init(self, leaves: Sequence[Any]) -> Any:
        """What it remembers from step to step, the same on all workers; nothing by default."""
        del leaves
        return ()

    @abc.abstractmethod
    def mean(self, leaves: Leaves, memory: Any, context: Round) -> Averaged:
        """The lossy mean of one round.

        Args:
          leaves: float32, this worker's own; finite unless its weight is 0.
          memory: of :meth:`init`, or of the round before.
          context: the round.
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
        moved = self.collectives(layout, n) if layout.size else ()
        return WireCost(self.transport, layout.size, moved)


class Gathered(Compressor):
    """A compressor whose messages cannot be summed in transit: all workers receive all of them."""

    @abc.abstractmethod
    def words(self, layout: Layout) -> int:
        """Words of a message."""

    @abc.abstractmethod
    def encode(self, leaves: Leaves, context: Round) -> list[Array]:
        """This worker's message in parts: uint32, of any shapes, ``words`` in all."""

    @abc.abstractmethod
    def decode(self, message: Array, layout: Layout) -> Leaves:
        """The leaves that a message, ``uint32[words]``, stands for, in float32."""

    def mean(self, leaves: Leaves, memory: Any, context: Round) -> Averaged:
        """Gathers all messages, and averages them one after the other."""
        layout = context.layout
        weight = wire.vary(context.weight.astype(jnp.uint32), context.axis)
        frame = frames.frame([*self.encode(leaves, context), weight], 1)[0]
        gathered = wire.gather(frame, context.axis, (frame.size,))

        def add(total: Leaves, frame: Array) -> tuple[Leaves, None]:
            values = self.decode(frame[:-1], layout)
            pairs = zip(total, values, strict=True)
            return [t + jnp.where(frame[-1] > 0, x, 0) for t, x in pairs], None

        nothing = [jnp.zeros(leaf.shape, jnp.float32) for leaf in layout.leaves]
        total, _ = jax.lax.scan(add, nothing, gathered)
        workers = gathered[:, -1].sum().astype(jnp.int32)
        mean = [t / workers.astype(jnp.float32) for t in total]
        return Averaged(mean, self.decode(frame[:-1], layout), memory, workers)

    def collectives(self, layout: Layout, n: int) -> tuple[Collective, ...]:
        """One all-gather."""
        return (Collective("all-gather", "u32", self.words(layout) + 1, n),)


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
    health: MeanHealth  # the last round's
    stamp: Array  # int32[2]; differs by worker: index and number of workers, since its first round
    roles = Roles(
        exchange=True,
        own=("error", "stamp"),
        shared=("count", "memory"),
        like_params=("error",),
        shares_itself=True,
    )


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
    error) has no finite norm in float32 sits the round out, and keeps its error; the state's
    :class:`distlion_jax.MeanHealth` shows it.

    Args:
      compressor: what is sent: :class:`QSGD`, :class:`TernGrad`, :class:`EFSign`, :class:`TopK` or
        :class:`PowerSGD`.
      axis_name: mapped axis, or axes, that the workers lie on.

    Returns:
      A transformation from local gradients to their lossy mean, the same on all workers and in the
      gradients' dtypes. Its extra argument ``participating`` (bool scalar) leaves this worker out;
      when nobody takes part the mean is NaN.

    Raises:
      ValueError: in ``init`` for parameters that are not real. In ``update``, at trace time: for an
        unbound axis, or a ``weight``; for gradients already summed over the axis, or not of the
        parameters' shapes; for a state of another compressor.

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

    def init(params: optax.Params) -> Any:
        checks.check_params(params, jnp.float32, 0.0)
        error = optax.tree.zeros_like(params, dtype=jnp.float32) if compressor.feedback else ()
        leaves = jax.tree.leaves(params)
        # Optax's placeholder for parameters has no leaves: one scalar then stands for all of it.
        memory = compressor.init(leaves) if leaves else jnp.zeros([])
        count = jnp.zeros([], jnp.int32)
        return CompressedAverageState(count, error, memory, no_mean(), blank())

    def update(
        context: Round, updates: optax.Updates, state: Any, params: optax.Params | None
    ) -> tuple[optax.Updates, Any]:
        if params is not None:
            checks.check_like(updates, params)
        if not compressor.feedback and jax.tree.leaves(state.error):
            raise ValueError(
                f"the state has an error that {compressor} would never send: it is of a compressor "
                "with error feedback. Use that one, or initialise anew."
            )
        wanted = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if compressor.feedback:
            checks.check_momentum(updates, state.error)
            wanted = jax.tree.map(jnp.add, wanted, state.error)
        if not context.layout.size:  # nothing to send, as for a label that no leaf has
            return nothing(updates), state
        context = context.only_if(finite_norm(wanted))
        leaves, treedef = jax.tree.flatten(wanted)
        out = compressor.mean(leaves, state.memory, context)
        error = state.error
        if compressor.feedback:
            rest = jax.tree.map(jnp.subtract, wanted, treedef.unflatten(out.sent))
            error = keep_unless_absent(context, rest, error)
        health = MeanHealth(context.takes_part, out.workers)
        return as_updates(out.mean, updates), state._replace(
            error=error,
            memory=wire.vary_tree(out.memory, axis_name),  # as the state is stacked
            health=as_held(health, state.health, axis_name),
        )

    return in_rounds(init, update, axis_name, None, split="never")


def keep_unless_absent(context: Round, new: Any, old: Any) -> Any:
    """The new state of a worker that took part, the old one of a worker that sat out.

    The old one too where the new one is not finite, so that one bad round is not remembered.
    """
    take = context.takes_part & all_finite(new)
    return jax.tree.map(lambda x, y: jnp.where(take, x, y), new, old)


def as_updates(mean: Leaves, updates: Any) -> Any:
    """Leaves in the structure and dtypes of the gradients."""
    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten([m.astype(g.dtype) for m, g in zip(mean, leaves, strict=True)])
