# SPDX-License-Identifier: Apache-2.0
"""What a ready-made step does around its compiled program, whatever maps it.

In:  the arguments of a call. Out: the results of the program; or an error, before it where that can
     be had, that says what is wrong with them.
"""

import dataclasses
import weakref
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distlion_jax.accumulate import adopt
from distlion_jax.exchanges import exchanges, is_once
from distlion_jax.train import _audit as audit
from distlion_jax.train import _checks as checks
from distlion_jax.train import _extra, _whole
from distlion_jax.train._metrics import Metrics
from distlion_jax.train._notes import leading_on, warn
from distlion_jax.train._processes import Company
from distlion_jax.train._state import per_worker

MOST_PARTS = 2**16  # micro-batches
_LOOKS_AT_VALUES = (  # what JAX raises for it under eval_shape
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Step(Protocol):
    """A train step, see :func:`distlion_jax.make_train_step`."""

    def __call__(self, *args: Any, rng: Any = None, **extra: Any) -> tuple[Any, ...]:
        """``step(params, state, batch)``; with ``has_model_state``, the model's state is second."""
        ...

    def lower(self, *args: Any, rng: Any = None, **extra: Any) -> jax.stages.Lowered:
        """The step's program for these arguments.

        What it compiles to takes the same ones; extra arguments with an entry for each worker.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Place:
    """The workers and devices that a step runs on."""

    devices: tuple[Any, ...]
    workers: int  # of all processes
    shards: int  # that share the rows which this process passes
    vote_sizes: tuple[int, ...]  # of the axes that vote
    stacked: bool  # whether the state has a leading worker axis
    watched: bool  # whether JAX does not check that replicas stay alike
    mine: tuple[int, ...] | None = None  # the workers whose entries and rows this process passes

    @property
    def entries(self) -> int:
        """How many workers' entries this process passes: of ``participating``, of states."""
        return self.workers if self.mine is None else len(self.mine)


def once_parts(state: Any) -> list[Any]:
    """What is stored once for all workers: it is the same on all, as parameters are."""
    return [x for x in jax.tree.leaves(state, is_leaf=is_once) if is_once(x)]


class Driver:
    """Checks around the program of a step.

    Args:
      tx: the transformation.
      place: of whom it is.
      agree: whether all devices hold the same bits of a tree of replicated arrays.
      lower: the program of arguments, key and extra arguments, before it is compiled.
      has_model_state: whether arguments and results have the model's state in second place.
      microbatches: how many parts a worker takes its rows in.
      donate: whether the program gives the buffers of its arguments away.
      one: takes the worker axis off the shapes of parameters, where they have one.
    """

    def __init__(
        self,
        tx: Any,
        place: Place,
        agree: Callable[[Any], bool],
        lower: Callable[..., Any],
        *,
        has_model_state: bool,
        microbatches: int,
        donate: bool,
        one: Callable[[Any], Any] = lambda params: params,
    ) -> None:
        self.tx, self.place = adopt(tx) if place.stacked else tx, place
        self.has_model_state, self.microbatches, self.donate = has_model_state, microbatches, donate
        self.company = Company(place.devices)
        self._agree, self._lower, self._one = agree, lower, one
        self._last: list[Any] = []  # weak references to the arrays that it returned last
        self._form: Any = None  # their structure
        self._shapes_met: set[Any] = set()  # of arguments whose programs the processes compared
        self._declared = True  # whether `tx` says that it makes workers agree
        self._calls = 0
        here = jax.process_index()
        mine = [d.platform for d in place.devices if d.process_index == here]
        # Virtual CPU devices share the threads of one pool: steps that queue up starve one
        # another's collectives, until XLA gives up and aborts the process.
        self._at_once = "cpu" in mine and (len(mine) > 1 or self.company.several)
        self._pending: Any = None  # figures of the last call, on accelerators of several processes

    def split(self, args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        """Parameters, model state (or nothing), state and batch."""
        wanted = ("params", *(("model_state",) if self.has_model_state else ()), "state", "batch")
        if len(args) != len(wanted):
            raise TypeError(f"the step takes ({', '.join(wanted)}); got {len(args)} arguments.")
        if self.has_model_state:
            params, model_state, state, batch = args
        else:
            (params, state, batch), model_state = args, ()
        return params, model_state, state, batch

    def join(self, four: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inverse of :meth:`split`, of arguments or results."""
        params, model_state, *rest = four
        return (params, model_state, *rest) if self.has_model_state else (params, *rest)

    def _begin(
        self, args: tuple[Any, ...], rng: Any, extra: dict[str, Any], *, meet: bool
    ) -> tuple[bool, tuple[Any, ...], Any, dict[str, Any]]:
        """Checks the arguments of a call.

        Returns whether any is traced, and the arguments to run with. ``meet``: whether the
        processes compare what they are about to run.
        """
        params, model_state, state, batch = self.split(args)
        place, new = self.place, self._are_new((params, model_state, state))
        if new:
            checks.check_places(params, state, batch)
        checks.check_alive(params=params, model_state=model_state, state=state, batch=batch)
        checks.check_batch(batch, place.shards, self.microbatches)
        checks.check_global(batch, self.company.several and place.mine is None)
        extra = _extra.by_worker(extra, place.workers, place.entries, votes=place.stacked)
        if new:
            state = self._of_tx(params, state)
            if place.mine is None:
                checks.check_devices(
                    place.devices, params=params, model_state=model_state, state=state
                )
            self._declared = not place.stacked or bool(exchanges(state))
        kept = params, model_state, state
        traced = checks.is_traced((batch, rng, extra, kept if new else ()))
        if traced:
            if place.watched and place.stacked and place.workers > 1:
                checks.check_declared(state)
            return True, self.join((*kept, batch)), rng, extra
        if self.donate:
            kept, (batch, rng, extra) = _apart(kept, (batch, rng, extra))
        if self.company.several and meet:
            self._meet(new, kept, batch, rng, extra)
        return False, self.join((*kept, batch)), rng, extra

    def _are_new(self, kept: Any) -> bool:
        """Whether these are not what the step returned last, which need no second look."""
        leaves, form = jax.tree.flatten(kept)
        if self._form is None or form != self._form:
            return True
        return any(x is not ref() for x, ref in zip(leaves, self._last, strict=True))

    def _remember(self, kept: Any) -> None:
        leaves, self._form = jax.tree.flatten(kept)
        self._last = [weakref.ref(x) for x in leaves]

    def _of_tx(self, params: Any, state: Any) -> Any:
        """The state, if it is whole and of this transformation."""
        n = self.place.entries
        if (shapes := self._shapes(params, n)) is not None:
            if self.place.stacked:
                state = _whole.with_health(_whole.with_rates(state, n), shapes)
            _whole.check_fits(state, shapes)
        if self.place.stacked:
            checks.check_by_worker(
                "state",
                per_worker(state),
                n,
                "Make states with init_state (or pmap_replicate, under pmap) for these workers; "
                "resize_state makes one for another number of them.",
            )
            if not checks.is_traced(state):
                _whole.check_whole(state, self.place.vote_sizes, self.place.mine)
        return state

    def _shapes(self, params: Any, n: int) -> Any:
        """Of the transformation's state; None where its ``init`` looks at values."""
        try:
            shapes = jax.eval_shape(lambda p: self.tx.init(self._one(p)), params)
        except _LOOKS_AT_VALUES:
            return None
        if not self.place.stacked:
            return shapes
        stacked = lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype)  # noqa: E731
        spread = lambda x: x if is_once(x) else stacked(x)  # noqa: E731
        return jax.tree.map(spread, shapes, is_leaf=is_once)

    def _meet(self, new: bool, kept: Any, batch: Any, rng: Any, extra: dict[str, Any]) -> None:
        """In several processes, where a call begins anew: raises unless all begin alike.

        Alike means the same program, the same shapes and the same shared state.
        """
        leaves, form = jax.tree.flatten((kept, batch, rng, extra))
        shapes = form, tuple((np.shape(x), getattr(x, "dtype", None)) for x in leaves)
        known = shapes in self._shapes_met
        if known and not new:
            return
        params, model_state, state = kept
        # By their paths: the structure's own text may hold addresses, which differ by process.
        paths = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path((kept, batch, extra))
        ]
        card = {"shapes": _crc(*paths, str(shapes[1]))}
        if self.place.stacked:
            card |= _whole.shared_values(state)
        if not known:
            card["the program"] = _program(self._lower(self.join((*kept, batch)), rng, extra))
        self.company.agree(card)
        self._compare(params, model_state, state)
        self._shapes_met.add(shapes)

    def _compare(self, params: Any, model_state: Any, state: Any) -> None:
        """Raises where what is the same on all workers has other bits on some."""
        same = self._same(params, model_state, state)
        if not self._agree(same):
            raise ValueError(
                f"`{audit.differing(self._agree, same)}` differs by process before call "
                f"{self.company.calls} of this step: each process drew its own, or restored "
                "another checkpoint. replicate(..., mesh), and pmap_replicate, make copies of "
                "process 0's for all."
            )

    def _same(self, params: Any, model_state: Any, state: Any) -> dict[str, Any]:
        """What must have the same bits on all workers, by name."""
        once = once_parts(state) if self.place.stacked else state
        return {"params": params, "model_state": model_state, "state": once}

    def run(
        self, program: Callable[..., tuple[Any, ...]], args: tuple[Any, ...], rng: Any, extra: Any
    ) -> tuple[Any, ...]:
        """One call: checks, the program, and a look at what it did."""
        with self.company.call(), leading_on():
            traced, args, rng, extra = self._begin(args, rng, extra, meet=True)
            out = program(traced, args, rng, extra)
            self.company.counts = True
            params, model_state, state, metrics = self.split(out)
            if traced or checks.is_traced(metrics):  # or the call was staged out whole
                return out
            self._calls += 1
            scheduled = audit.is_scheduled(self._calls)
            self._wait(metrics, scheduled, (args, rng, extra, out))
            if (self.place.watched or self.company.several) and self.place.workers > 1:
                declared = self._declared or not self.place.watched
                if scheduled or not declared:
                    same = self._same(params, model_state, state)
                    audit.check_alike(self._agree, same, self._calls)
            if scheduled:
                self._warn(metrics)
            self._remember((params, model_state, state))
            return out

    def check(
        self, args: tuple[Any, ...], rng: Any, extra: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Any, dict[str, Any]]:
        """What a call makes of its arguments; shapes alone are taken as they are.

        No other process is asked: one of them may lower a program alone.
        """
        arrays = [isinstance(x, np.ndarray | jax.Array) for x in jax.tree.leaves(args)]
        if all(arrays) and not checks.is_traced(args):
            _, args, rng, extra = self._begin(args, rng, extra, meet=False)
            return args, rng, extra
        place = self.place
        return args, rng, _extra.by_worker(extra, place.workers, place.entries, place.stacked)

    def _wait(self, metrics: Metrics, now: bool, uses: Any) -> None:
        """Waits with an ear for the other processes: for this call, or for the one before it.

        Args:
          metrics: the figures of this call.
          now: whether something is about to look at its results.
          uses: all arrays of its program.
        """
        if not (self._at_once or now):
            metrics, self._pending = self._pending, metrics if self.company.several else None
        if self.company.several:
            self.company.wait(metrics, uses)
        elif self._at_once:
            jax.block_until_ready(metrics)

    def _warn(self, metrics: Metrics) -> None:
        """A word where rounding loses most of what an update would do."""
        if metrics.unmoved is None:
            return
        share = float(np.asarray(metrics.unmoved))
        if share > 0.1:
            warn(
                f"{share:.0%} of the bfloat16 (or narrower) parameters did not move in call "
                f"{self._calls}: the update is less than half the distance to the next number (for "
                "1.0 that is 0.002). Keep the parameters in float32 and cast them in the loss "
                "function: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)."
            )


def _crc(*texts: str) -> str:
    return f"{zlib.crc32(repr(texts).encode()):08x}"


def _program(lowered: Any) -> str:
    """A hash of a program; none where it calls back into Python, by addresses of each process."""
    text = lowered.as_text()
    return "" if "callback" in text else _crc(text)


def given(rng: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a program: one that is lowered without a key is called without."""
    return extra if rng is None else {"rng": rng, **extra}


def _apart(kept: Any, others: Any) -> tuple[Any, Any]:
    """The same arrays, with copies where one that is kept occurs again: it is given away once."""
    leaves, treedef = jax.tree.flatten(kept)
    given_away: set[int] = set()
    for i, x in enumerate(leaves):
        if id(x) in given_away and isinstance(x, jax.Array):
            leaves[i] = jnp.copy(x)
        given_away.add(id(x))
    again = lambda x: jnp.copy(x) if id(x) in given_away else x  # noqa: E731
    return treedef.unflatten(leaves), jax.tree.map(again, others)
