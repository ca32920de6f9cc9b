# SPDX-License-Identifier: Apache-2.0
"""The train step of workers that are replicas of a sharded model.

In:  the loss of one replica, a transformation, a mesh with axes beside the vote's.
Out: a jitted step, as :func:`distlion_jax.make_train_step` makes it; parameters and momenta stay
     split as they came.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax._vote import wire
from distlion_jax._vote.shards import names, sharding_of
from distlion_jax.hlo import UPDATE, leaks
from distlion_jax.train import _audit as audit
from distlion_jax.train._checks import check_declared, check_differ
from distlion_jax.train._drive import Driver, Place, Step, given
from distlion_jax.train._gradient import value_and_gradient
from distlion_jax.train._notes import leading_on, warn
from distlion_jax.train._placement import Placement, specs_like, state_specs
from distlion_jax.train._replicas import by_replica, check_automatic, constrain, constrain_each, own
from distlion_jax.train._specs import is_spec
from distlion_jax.train._state import stack, unstack
from distlion_jax.train._worker import worker_update


def replica_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    place: Placement,
    *,
    has_aux: bool,
    has_model_state: bool,
    microbatches: int,
    check_vma: bool,
    donate: bool,
) -> Step:
    """See :func:`distlion_jax.make_train_step`, whose arguments these are."""
    check_automatic(place.mesh, place.vote_axes)
    gradients = _gradients(
        value_and_gradient(loss_fn, (), has_aux, has_model_state, microbatches), place
    )

    def run(
        unseen: bool, specs: tuple[P, ...], *args: Any, rng: Any = None, **extra: Any
    ) -> tuple[Any, ...]:
        params, model_state, state, batch = driver.split(args)
        tree = jax.tree.unflatten(jax.tree.structure(params), specs)
        found = gradients(params, model_state, batch, rng, tree)
        with jax.named_scope(UPDATE):
            out = _update(tx, place, tree, check_vma)(params, model_state, state, found, extra)
        params, model_state, state, metrics = out
        params = constrain(params, tree, place.mesh)
        if unseen:  # nobody else can look: a loss that is NaN is seen
            same = audit.comparison(place.mesh, specs)(jax.tree.leaves(params)).all()
            metrics = metrics._replace(loss=jnp.where(same, metrics.loss, jnp.nan))
        like = specs_like(state, place.vote_axes, params, tree)
        return driver.join((params, model_state, constrain(state, like, place.mesh), metrics))

    kept = tuple(range(2, 4 + has_model_state)) if donate else ()
    jitted = jax.jit(run, static_argnums=(0, 1), donate_argnums=kept)

    known: dict[Any, tuple[P, ...]] = {}  # by shardings: reading specs takes as long as a step may

    def specs(params: Any) -> tuple[P, ...]:
        placed = tuple(map(sharding_of, jax.tree.leaves(params)))
        if placed not in known:
            known[placed] = tuple(jax.tree.leaves(place.specs(params), is_leaf=is_spec))
        return known[placed]

    driver = Driver(
        tx,
        Place(
            tuple(place.mesh.devices.flat),
            workers=place.workers,
            shards=place.workers,
            vote_sizes=tuple(place.mesh.shape[name] for name in wire.axes(place.vote_axes)),
            stacked=True,
            # The region in which shards are voted on is not checked by JAX.
            watched=True,
        ),
        lambda tree: audit.agree(tree, place.mesh),
        lambda args, rng, extra: jitted.lower(False, specs(args[0]), *args, **given(rng, extra)),
        has_model_state=has_model_state,
        microbatches=microbatches,
        donate=donate,
    )
    looked: set[Any] = set()  # specs and shapes of a batch: the programs that were looked at

    def program(unseen: bool, args: Any, rng: Any, extra: Any) -> tuple[Any, ...]:
        mine, more = specs(args[0]), given(rng, extra)
        key = mine, tuple(map(np.shape, jax.tree.leaves(args[-1])))
        if not unseen and key not in looked:
            looked.add(key)
            _warn_of_idle(place, args[0], args[-1])
            _warn_of_leaks(jitted.lower(False, mine, *args, **more).compile(), place)
        return jitted(unseen, mine, *args, **more)

    def step(*args: Any, rng: Any = None, **extra: Any) -> tuple[Any, ...]:
        return driver.run(program, args, rng, extra)

    def lower(*args: Any, rng: Any = None, **extra: Any) -> jax.stages.Lowered:
        check_declared(driver.split(args)[2])
        with leading_on():
            args, rng, extra = driver.check(args, rng, extra)
            return jitted.lower(True, specs(args[0]), *args, **given(rng, extra))

    step.lower = lower  # type: ignore[attr-defined]
    return cast(Step, step)


def _gradients(gradient: Callable[..., Any], place: Placement) -> Callable[..., tuple[Any, ...]]:
    """Loss, new model state, aux and gradient of every replica, with a leading axis."""
    axes = wire.axes(place.vote_axes)

    def gradients(params: Any, model_state: Any, batch: Any, rng: Any, specs: Any) -> Any:
        fold = jax.vmap(lambda i: jax.random.fold_in(rng, i))
        keys = None if rng is None else fold(jnp.arange(place.workers))
        mapped = jax.vmap(
            gradient,
            in_axes=(None, None, 0, None if rng is None else 0),
            spmd_axis_name=axes,
        )
        loss, seen, aux, grads = mapped(params, model_state, by_replica(batch, place), keys)
        return loss, seen, aux, constrain_each(grads, specs, place)

    return gradients


def _update(
    tx: optax.GradientTransformation, place: Placement, specs: Any, check_vma: bool
) -> Callable[..., tuple[Any, ...]]:
    """What follows the gradients, by every replica on whole leaves."""
    axes = wire.axes(place.vote_axes)
    finish = worker_update(tx, axes, axes, specs=specs)

    def mine(params: Any, model_state: Any, state: Any, found: Any, extra: Any) -> tuple[Any, ...]:
        state = unstack(state, place.vote_axes)
        params, model_state, state, metrics = finish(
            params, model_state, state, own(found), own(extra)
        )
        check_differ(axes, state, params)
        return params, model_state, stack(state), metrics

    def update(params: Any, model_state: Any, state: Any, found: Any, extra: Any) -> Any:
        by_state, by_worker = state_specs(state, place.vote_axes), place.by_worker
        mapped = jax.shard_map(
            mine,
            mesh=place.mesh,
            in_specs=(P(), P(), by_state, by_worker, by_worker),
            out_specs=(P(), P(), by_state, P()),
            axis_names=set(axes),
            check_vma=check_vma,
        )
        return mapped(params, model_state, state, found, extra)

    return update


def _warn_of_idle(place: Placement, params: Any, batch: Any) -> None:
    """A word where neither rows nor parameters are split over an axis inside a replica."""
    found = map(sharding_of, jax.tree.leaves((params, batch)))
    specs = [x.spec for x in found if isinstance(x, NamedSharding)]
    used = {name for spec in specs for name in names(spec)}
    if idle := [name for name in place.replica_axes if name not in used]:
        rows = (*wire.axes(place.vote_axes), idle[0])
        warn(
            f"neither parameters nor batch are split over {idle} of the mesh: its devices repeat "
            "one another's work. Place the batch over the axes that share its rows, as "
            f"jax.device_put(batch, NamedSharding(mesh, P({rows})))."
        )


def _warn_of_leaks(compiled: jax.stages.Compiled, place: Placement) -> None:
    """A word where the compiler moves activations between replicas."""
    if not (found := leaks(compiled, place.mesh, place.vote_axes)):
        return
    worst = max(found, key=lambda one: one.collective.bytes_received)
    total = sum(one.collective.bytes_received for one in found)
    warn(
        f"the compiler moves {total:,} bytes a step and device between replicas, over "
        f"{place.vote_axes!r}, beside the vote: it cannot split some operation inside a replica. "
        f"The largest is {worst.collective.op} of {worst.collective.dtype}"
        f"[{worst.collective.elements}], of {worst.operation or 'no named operation'}. Constrain "
        "what it reads, such as the table of an embedding: jax.lax.with_sharding_constraint(table, "
        f"NamedSharding(mesh, P({place.replica_axes[-1]!r}, None))). distlion_jax.leaks lists all."
    )
