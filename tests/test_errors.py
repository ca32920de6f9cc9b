# SPDX-License-Identifier: Apache-2.0
"""Every error that the package raises, by its text: argument, value, and the way out."""

import ast
import functools
import re
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import distlion_jax as dl
from distlion_jax import baselines, reference
from distlion_jax.forecast import exchange_seconds
from distlion_jax.train._processes import Watch, Word
from tests.helpers import TREES, gradients, run
from tests.steps import start

ROOT = Path(dl.__file__).parent
N = 4
PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
G = jax.tree.map(lambda x: jnp.stack([x] * N), PARAMS)
BATCH = jnp.ones((16, 3))


def loss(params, batch):
    return jnp.mean((batch @ params["w"].T) ** 2) + jnp.sum(params["b"])


def option(learning_rate=0.1, **options):
    return lambda: dl.distributed_lion(learning_rate, **options)


def muon(**options):
    return lambda: dl.scale_by_distributed_muon(**options)


def numbers(chosen):
    """A vote on PARAMS with these dimension numbers."""
    return vote(dl.scale_by_distributed_muon(muon_weight_dimension_numbers=chosen))


def init(*leaves, **options):
    return lambda: dl.scale_by_distributed_lion(**options).init(list(leaves))


def vote(
    tx=None,
    g=G,
    params=PARAMS,
    state_of=PARAMS,
    arrays=None,
    static=None,
    momentum=None,
    **options,
):
    """Traces a round; of its extra arguments ``arrays`` have an entry for each worker."""
    arrays, static = arrays or {}, static or {}

    def call():
        optimizer = optax.with_extra_args_support(tx or dl.scale_by_distributed_lion(**options))
        state = optimizer.init(state_of)
        if momentum is not None:  # as a lossy checkpoint would leave it
            state = state._replace(mu=jax.tree.map(lambda m: m.astype(momentum), state.mu))

        def worker(g, arrays):
            return optimizer.update(g, state, params, **arrays, **static)

        return jax.eval_shape(jax.vmap(worker, axis_name="data"), g, arrays)

    return call


def state_of_another(one, two):
    """A compressor goes on with the state of another."""

    def call():
        g = jnp.ones((N, 24, 16))
        state = baselines.compressed_average(one).init(g[0])
        update = baselines.compressed_average(two).update
        return jax.eval_shape(jax.vmap(lambda g: update(g, state)[0], axis_name="data"), g)

    return call


def step(batch=BATCH, state_workers=8, options=None, tx=None, **extra):
    """A step of 8 workers on a mesh."""
    tx = tx or dl.distributed_lion(0.1)

    def call():
        state = dl.init_state(tx, PARAMS, dl.worker_mesh(state_workers))
        run_step = dl.make_train_step(loss, tx, dl.worker_mesh(8), **(options or {}))
        return run_step(PARAMS, state, batch, **extra)

    return call


def pmap_step(batch=BATCH, state_workers=8, tx=None):
    tx = tx or dl.distributed_lion(0.1)

    def call():
        state = dl.pmap_replicate(tx.init(PARAMS), jax.devices()[:state_workers])
        return dl.make_pmap_train_step(loss, tx)(dl.pmap_replicate(PARAMS), state, batch)

    return call


def edge(tx=None, how="shard_map", loss=loss, calls=1, change=lambda p, s: (p, s), **options):
    """A step of 8 workers under one of the maps, with what it was given changed on the way."""
    extra = options.pop("extra", {})
    model_state = options.pop("model_state", None)
    batch = options.pop("batch", BATCH)

    def call():
        run_step, *kept = start(
            loss, tx or dl.distributed_lion(0.1), PARAMS, how, model_state, **options
        )
        for _ in range(calls - 1):
            *kept, _ = run_step(*kept, batch)
        kept[0], kept[-1] = change(kept[0], kept[-1])
        return run_step(*kept, batch, **extra)

    return call


def donated():
    run_step, params, state = start(loss, dl.distributed_lion(0.1), PARAMS, "shard_map")
    run_step(params, state, BATCH)
    run_step(params, state, BATCH)


def both_kinds_of_axes():
    tx = dl.scale_by_distributed_lion(axis_name=("data", "local"), transport="two_phase")
    one = lambda g: tx.update(g, tx.init(g))[0]  # noqa: E731
    jax.pmap(jax.vmap(one, axis_name="local"), axis_name="data")(jnp.ones((8, 2, 3)))


def dropping(inner):
    """A transformation of the old kind, which takes no extra arguments."""
    return optax.GradientTransformation(inner.init, lambda u, s, p=None: inner.update(u, s, p))


def skipping(inner):
    """As optax.MultiSteps with should_skip_update_fn, inside a chain."""
    multi = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
    return optax.chain(optax.clip(1.0), multi.gradient_transformation())


def recurrent(params, batch):
    """A scan that begins with zeros."""
    cell = lambda h, x: (jnp.tanh(x @ params["w"].T + h), None)  # noqa: E731
    return jnp.mean(jax.lax.scan(cell, jnp.zeros(2), batch)[0])


def with_aux(params, batch):
    return loss(params, batch), batch


def regrouped(params, state):
    return params, (dict(enumerate(state)), *state[1:])


def unreplicated(params, state):
    return params, jax.tree.map(lambda x: jnp.stack([x[0]] * 8), state)


LABELS = ({"w": "majority", "b": "frozen"}, {"w": "majority", "b": "average"})


def waiting(word, seconds):
    """A process waits in call 3; this is all that it hears, at once and so much later."""

    def call():
        watch = Watch(3, 0, lambda: [word], 0.0)
        watch.look(5.0)
        watch.look(5.0 + seconds)

    return call


def marked(n, indices, workers):
    """A state of n rows, as those workers of so many left it."""
    tx = dl.scale_by_distributed_lion()
    state = jax.tree.map(lambda x: np.stack([x] * n), tx.init(PARAMS))
    return state._replace(stamp=np.array([[i, workers] for i in indices], np.int32))


def as_bfloat16(state):
    mu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state[0].mu)
    return (state[0]._replace(mu=mu), *state[1:])


def mean_of_all(updates, params):
    return jax.lax.pmean(updates, "data")


def relabelled():
    """A loop of one's own goes on with other labels."""
    before, after = (dl.distributed_lion_by_label(0.1, labels) for labels in LABELS)
    worker = lambda g: after.update(g, before.init(PARAMS), PARAMS)  # noqa: E731
    return jax.eval_shape(jax.vmap(worker, axis_name="data"), G)


def nobody_agrees(how):
    """Each worker takes Lion's step on its own gradient."""

    def call():
        tx, mesh, params = optax.lion(0.1), dl.worker_mesh(8), jnp.zeros(2)
        if how.startswith("later"):  # all alike until the fifth update
            tx = optax.lion(lambda count: jnp.where(count < 4, 0.0, 0.1), weight_decay=0.0)
        rows = jnp.arange(-15.0, 17.0).reshape(16, 2)
        linear = lambda x, rows: jnp.sum(x * rows.mean(0))  # noqa: E731
        if how.endswith("pmap"):
            params, state = dl.pmap_replicate(params), dl.pmap_replicate(tx.init(params))
            run_step = dl.make_pmap_train_step(linear, tx)
        else:
            params, state = dl.replicate(params, mesh), dl.init_state(tx, params, mesh)
            run_step = dl.make_train_step(linear, tx, mesh, check_vma=False)
        for _ in range(5):
            params, state, _ = run_step(params, state, rows)

    return call


def traced_step(how):
    """A step that cannot look at the parameters: lowered, or inside ``jax.jit``."""

    def call():
        tx, mesh = optax.lion(0.1), dl.worker_mesh(8)
        if how == "pmap":
            params, state = dl.pmap_replicate(PARAMS), dl.pmap_replicate(tx.init(PARAMS))
            return jax.jit(dl.make_pmap_train_step(loss, tx))(params, state, BATCH)
        state = dl.init_state(tx, PARAMS, mesh)
        run_step = dl.make_train_step(loss, tx, mesh, check_vma=False, donate=False)
        if how == "lowered":
            return run_step.lower(PARAMS, state, BATCH)
        if how == "closed over":
            return jax.jit(lambda batch: run_step(PARAMS, state, batch))(BATCH)
        return jax.jit(run_step)(PARAMS, state, BATCH)

    return call


class Annotated(NamedTuple):
    count: Any
    roles: Any = dl.Roles(shared=("count",))


def annotated_roles():
    tx = optax.GradientTransformation(lambda _: Annotated(0), lambda g, s, p=None: (g, s))
    return dl.init_state(optax.chain(dl.distributed_lion(0.1), tx), PARAMS, dl.worker_mesh(8))


class Misspelt(NamedTuple):
    count: Any
    roles = dl.Roles(shared=("cuont",))


def misspelt_roles():
    tx = optax.GradientTransformation(lambda _: Misspelt(jnp.int32(0)), lambda g, s, p=None: (g, s))
    return step(tx=optax.chain(dl.distributed_lion(0.1), tx))()


def apart():
    """Workers of pmap that begin with parameters of their own."""
    tx, params = dl.distributed_lion(0.1), dl.pmap_replicate(PARAMS)
    params["b"] = params["b"] + jnp.arange(8.0)[:, None]
    return dl.make_pmap_train_step(loss, tx)(params, dl.pmap_replicate(tx.init(PARAMS)), BATCH)


def on_mesh(worker, *args):
    """Traces a worker under ``jax.shard_map`` with JAX's check on; the first argument is shared."""
    specs = dict(in_specs=(P(), P("data")), out_specs=P())
    return jax.eval_shape(jax.shard_map(worker, mesh=dl.worker_mesh(N), **specs), *args)


def summed_gradients():
    tx = dl.scale_by_distributed_lion()
    grad = jax.grad(loss)
    return on_mesh(lambda x, batch: tx.update(grad(x, batch), tx.init(x))[0], PARAMS, BATCH)


def summed_then_averaged():
    tx = dl.average_gradients("data", steps=1)
    grad = jax.grad(lambda b, x: jnp.sum(b) * x.sum())
    return on_mesh(lambda b, x: tx.update(grad(b, x), tx.init(b))[0], PARAMS["b"], BATCH)


def state_of_eight_on_four():
    state = dl.init_state(dl.distributed_lion(0.1), PARAMS, dl.worker_mesh(8))
    return on_mesh(lambda _, state: dl.unstack(state), PARAMS, state)


def state_for_axis(name):
    return lambda: dl.init_state(dl.distributed_lion(0.1), PARAMS, dl.worker_mesh(8), name)


def split_mesh(kind=AxisType.Auto, axes=("data", "model")):
    sizes = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}[len(axes)]
    return jax.make_mesh(sizes, axes, (kind,) * len(axes))


def split_step(mesh=None, **options):
    return lambda: dl.make_train_step(
        loss, dl.distributed_lion(0.1), split_mesh() if mesh is None else mesh, **options
    )


def sharded(specs, mesh=None):
    return lambda: dl.sharded(
        dl.distributed_lion(0.1, axis_name="data"), split_mesh() if mesh is None else mesh, specs,
        "data",
    )  # fmt: skip


def sharded_update(grads, given=True):
    tx = sharded({k: P() for k in PARAMS})()
    return tx.update(grads, tx.init(PARAMS), PARAMS if given else None)


def on_replicas(tx, mesh=None, **extra):
    """An update where only the vote's axis is manual."""

    def run():
        where = split_mesh() if mesh is None else mesh
        grads = jax.tree.map(lambda x: jnp.ones((4, *x.shape)), PARAMS)
        f = jax.shard_map(
            lambda g: tx.update(g, tx.init(PARAMS), PARAMS, **extra)[0], mesh=where,
            in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False,
        )  # fmt: skip
        return jax.jit(f)(grads)

    return run


def placed(spec, mesh=None):
    sharding = NamedSharding(split_mesh() if mesh is None else mesh, spec)
    return {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}


def unbound():
    tx = dl.scale_by_distributed_lion()
    return tx.update(PARAMS, tx.init(PARAMS))


def not_unstacked():
    mesh, tx = dl.worker_mesh(N), dl.distributed_lion(0.1)

    def worker(g, state):
        return tx.update(g, state, g)[0]

    specs = dict(in_specs=(P(), P("data")), out_specs=P("data"))
    mapped = jax.shard_map(worker, mesh=mesh, check_vma=False, **specs)
    return jax.eval_shape(mapped, PARAMS, dl.init_state(tx, PARAMS, mesh))


def by_label(labels, **options):
    return lambda: dl.distributed_lion_by_label(0.1, labels, **options).init(PARAMS)


def dense(steps):
    return lambda: dl.average_gradients("data", steps)


def injected():
    tx = optax.inject_hyperparams(dl.scale_by_distributed_lion)(max_weight=3)
    return jax.eval_shape(lambda state: tx.update(PARAMS, state, PARAMS), tx.init(PARAMS))


half, ternary = {"mu_dtype": jnp.float16}, {"ballot": "ternary"}
bools, ints, floats = jnp.ones((N, 2), bool), jnp.ones((N, 2), jnp.int32), jnp.ones(N)


def forecast(f=dl.forecast_vote, parameters=1000, n=8, link=None, compute=1.0, **options):
    link = dl.Link(1e9) if link is None else link
    return lambda: f(parameters, n, link, compute, **options)


def dgc(*args, **options):
    return lambda: baselines.deep_gradient_compression(*args, **options)


# The message, with " ... " where it is cut short, and what it is an answer to.
CASES = {
    # Forecasts
    "`parameters` must be a finite number of at least 1; got 0.": forecast(parameters=0),
    "`link.bandwidth` must be a finite number of at least 1; got -1.": forecast(link=dl.Link(-1)),
    "`link.latency` must be a finite number of at least 0; got nan.": forecast(
        link=dl.Link(1e9, float("nan"))
    ),
    "`compute` must be a finite number of at least 0; got -0.1.": forecast(compute=-0.1),
    "`newton_schulz` must be a finite number of at least 0; got -1.": forecast(newton_schulz=-1.0),
    "`codec` must be a finite number of at least 0; got inf.": forecast(codec=float("inf")),
    "`n` (workers) must be a whole number of at least 2, or ... got 1.": forecast(n=1),
    "`n` (workers) must be a whole number of at least 2, or ... got 2.5.": forecast(n=2.5),
    "`link.per_node` must divide the 8 workers, into whole nodes; got 3.": forecast(
        link=dl.Link(1e9, 0.0, 3)
    ),
    "`link.per_node` must divide the 8 workers, into whole nodes; got 0.": forecast(
        link=dl.Link(1e9, 0.0, 0)
    ),
    "`overlap` must lie in [0, 1]; got 1.5.": forecast(dl.forecast_all_reduce, overlap=1.5),
    "`dtype` must be one of 'f32', 'bf16'; got 'f16'.": forecast(
        dl.forecast_all_reduce, dtype="f16"
    ),
    "`cost` has a collective of kind 'collective-permute'": lambda: exchange_seconds(
        dl.WireCost("", 1, (dl.Collective("collective-permute", "f32", 1, N),)), dl.Link(1e9)
    ),
    # Options
    "`aggregation` must be one of 'majority', 'average'; got 'x'.": option(aggregation="x"),
    "`transport` must be one of 'auto', 'all_gather', 'two_phase', 'psum'; got 'x'.": option(
        transport="x"
    ),
    "`ties` must be one of 'zero', 'coin'; got 'x'.": option(ties="x"),
    "`ballot` must be one of 'binary', 'ternary'; got 'x'.": option(ballot="x"),
    "`health` must be one of 'off', 'total', 'leaf'; got 'x'.": option(health="x"),
    "`gradients` must be one of 'local', 'mean'; got 'x'.": step(options={"gradients": "x"}),
    "`b1` must lie in [0, 1); got 1.0.": option(b1=1.0),
    "`b1` must lie in [0, 1); got -0.1.": option(b1=-0.1),
    "`b2` must lie in [0, 1); got 2.": option(b2=2),
    "`b2` must lie in [0, 1); got np.float32(1.5).": option(b2=np.float32(1.5)),
    "`b2` must lie in [0, 1); got Array(1.5,": option(b2=jnp.float32(1.5)),
    "`b1` must lie in [0, 1); got [0.9].": option(b1=[0.9]),
    "`b2` must lie in [0, 1); got nan.": option(b2=float("nan")),
    "`mu_dtype` must be float32 or bfloat16; got float16. ... mu_dtype=jnp.float32": option(**half),
    "`mu_dtype` must be float32 or bfloat16; got int8.": option(mu_dtype=jnp.int8),
    "module 'distlion_jax' has no attribute 'lyon'": lambda: dl.lyon,  # type: ignore
    "distributed_lion() has no argument `tie`. Did you mean `ties`?": option(tie="coin"),
    "wire_cost() has no argument `aggregate`. Did you mean `aggregation`?": lambda: dl.wire_cost(
        PARAMS, 8, aggregate="average"
    ),
    "`threshold` 0.5 needs ballot='ternary'": option(threshold=0.5),
    "`threshold` must be a finite ... got -1.": option(threshold=-1, **ternary),
    "`threshold` must be a finite ... got np.float32(-1.0).": option(
        threshold=np.float32(-1), **ternary
    ),
    "`threshold` must be a finite ... got nan.": option(threshold=float("nan"), **ternary),
    "`noise` must be a finite number of at least 0; got -1.": option(noise=-1),
    "`noise` must be a finite number of at least 0; got inf.": option(noise=float("inf")),
    "`max_weight` must lie in [1, 65535]; got 0.": option(max_weight=0),
    "`max_weight` must lie in [1, 65535]; got 65536.": option(max_weight=2**16),
    "`max_weight` must be a static Python int or None; got 2.5.": option(max_weight=2.5),
    "`max_weight` must be ... got ... static_args=('max_weight',)": injected,
    "`chunks` must lie in [1, 64]; got 0.": option(chunks=0),
    "`chunks` must lie in [1, 64]; got 65.": option(chunks=65),
    "`chunks` must be a static Python int or None; got 2.5.": option(chunks=2.5),
    "`seed` must lie in [0, 4294967295]; got -1.": option(seed=-1),
    "`chunks` 4 splits words, and transport='psum' sends none. ... 'all_gather'": option(
        chunks=4, transport="psum"
    ),
    "`axis_name` must name at least one axis; got (). ... axis_name=None": option(axis_name=()),
    "`axis_name` must name at least one axis; got None.": lambda: dl.distributed_lion_by_label(
        0.1, "full", axis_name=None
    ),
    "`b1` must lie in [0, 1); got 1.5.": lambda: dl.scale_by_averaged_lion(b1=1.5),
    "`b2` must lie in [0, 1); got -3.": lambda: dl.scale_by_averaged_lion(b2=-3),
    "`max_weight` 65535 times 300 workers is more than 2**24": vote(
        g=jax.tree.map(lambda x: jnp.ones((300, *x.shape[1:])), G), max_weight=2**16 - 1
    ),
    "`state` has a worker axis (its count has shape (1,)) ... distlion_jax.unstack": not_unstacked,
    "`tree['w']` is not replicated over devices": lambda: dl.replicas_agree(
        {"w": jax.device_put(jnp.arange(8.0), NamedSharding(dl.worker_mesh(8), P("data")))},
        dl.worker_mesh(8),
    ),
    "`compiled` holds no HLO instruction ... it begins 'ROOT": lambda: dl.compiled_collectives(
        "ROOT add = f32[] add(x, y)", 8
    ),
    "`steps` must be a static int of at least 0, or None; got -1.": dense(-1),
    "`steps` must be a static int of at least 0, or None; got 1.5.": dense(1.5),
    "`steps` must be a static int of at least 0, or None; got True.": dense(True),
    "`wire_dtype` must be float32, bfloat16 or None; got float16": lambda: dl.average_gradients(
        wire_dtype=jnp.float16
    ),
    "`labels['b']` must be one of 'majority', 'average', 'full', 'frozen'; got 'x'.": by_label(
        {"w": "full", "b": "x"}
    ),
    # Hidden matrices
    "`ns_steps` must lie in [1, 100]; got 0.": muon(ns_steps=0),
    "`ns_steps` must be a static Python int or None; got 2.5. ... static_args": muon(ns_steps=2.5),
    "`period` must lie in [1, 2147483647]; got 0.": muon(period=0),
    "`ns_dtype` must be jnp.float32, jnp.bfloat16 or ... got <class": muon(ns_dtype=jnp.float16),
    "`ns_dtype` must be jnp.float32, ... got 'bf16'. ... static_args=('ns_dtype',)": muon(
        ns_dtype="bf16"
    ),
    "`threshold` 0.5 is in units of what is signed, which `period` 2 changes": muon(
        threshold=0.5, ballot="ternary", period=2
    ),
    "`rest_factor` must be a finite number of at least 0; got -1.": lambda: dl.distributed_muon(
        0.1, rest_factor=-1
    ),
    "`rest_factor` must be a finite number ... got <function": lambda: dl.distributed_muon(
        0.1, rest_factor=optax.constant_schedule(0.5)
    ),
    "`params` is a single number, Array(0, dtype=int32): optax.inject_hyperparams": lambda: (
        dl.hidden_matrices(jnp.zeros([], jnp.int32))
    ),
    "`muon_weight_dimension_numbers['w']` must be optax.contrib ... got True.": numbers(
        {"w": True, "b": None}
    ),
    "`muon_weight_dimension_numbers['b']` must name different axes of shape (3,)": numbers(
        MuonDimensionNumbers()
    ),
    "must name different axes of shape ... reduction_axis=1, output_axis=-1": numbers(
        {"w": MuonDimensionNumbers(1, -1), "b": None}
    ),
    "must name different axes of shape ... reduction_axis=[], output_axis=1": numbers(
        {"w": MuonDimensionNumbers([], 1), "b": None}
    ),
    "must name different axes of shape ... Python integers; got ... 0.0": numbers(
        {"w": MuonDimensionNumbers(0.0, 1), "b": None}  # type: ignore[arg-type]
    ),
    "`muon_weight_dimension_numbers` must be a tree of MuonDimensionNumbers and None as": numbers(
        {"w": None}
    ),
    "`params` 'out/kernel' of shape (3, 4, 3) can be a stack of matrices as well": lambda: (
        dl.hidden_matrices(
            {"query": {"kernel": jnp.ones((3, 3, 4))}, "out": {"kernel": jnp.ones((3, 4, 3))}}
        )
    ),
    "`exclude` must be a regular expression, as '^Dense_0/'; got '(': missing": lambda: (
        dl.hidden_matrices(PARAMS, exclude="(")
    ),
    "`n` (workers) must be at least 1; got 0.": lambda: dl.wire_cost(PARAMS, 0),
    "unknown rule among 'majority', 'x', 'binary'": lambda: reference.vote(
        reference.init([], 1), [[]], ties="x"
    ),
    # Baselines
    "`compressor` must be a Compressor, as QSGD() or PowerSGD(rank=2); got 'qsgd'.": lambda: (
        baselines.compressed_average("qsgd")  # type: ignore[arg-type]
    ),
    "`levels` must lie in [1, 32767]; got 0.": lambda: baselines.QSGD(levels=0),
    "`bucket` must be a static Python int; got 1.5.": lambda: baselines.QSGD(bucket=1.5),
    "`norm` must be one of 'l2', 'max'; got 'l1'.": lambda: baselines.QSGD(norm="l1"),
    "`weight` is for a vote; a compressed average weighs all workers alike.": vote(
        baselines.compressed_average(baselines.QSGD()), static={"weight": 1}
    ),
    "`clip` must be a finite number above 0, or None; got 0.": lambda: baselines.TernGrad(clip=0),
    "`density` must be a static number in (0, 1]; got 0.": lambda: baselines.TopK(0),
    "`density` must be a static number in (0, 1]; got 1.5.": dgc(0.1, warmup=(1.5,)),
    "`momentum` must lie in [0, 1); got 1.": dgc(momentum=1),
    "`warmup_steps` must be an int of at least 1; got 0.": dgc(warmup_steps=0),
    "`clip_norm` must be a number above 0, or None; got -1.": dgc(clip_norm=-1),
    "`rank` must lie in [1, 32768]; got 0.": lambda: baselines.PowerSGD(0),
    "have shapes [(16, 1)]; PowerSGD(rank=2) needs [(16, 2)]. ... anew": state_of_another(
        baselines.PowerSGD(1), baselines.PowerSGD(2)
    ),
    "the state has an error that QSGD( ... would never send: it is of": state_of_another(
        baselines.EFSign(), baselines.QSGD()
    ),
    "`updates['b']` has shape (1,), its parameter (3,): gradients have the shapes": vote(
        baselines.compressed_average(baselines.QSGD()), g=jax.tree.map(lambda x: x[..., :1], G)
    ),
    "`params['b']` differs by worker after call 1 of this step: it differed from the": apart,
    "`roles` of Misspelt names the fields ['cuont'], which it lacks; it has ['count'].": (
        misspelt_roles
    ),
    "`tx` holds a vote or an average over the workers, whose state is each": lambda: dl.replicated(
        dl.distributed_lion(0.1)
    ).init(PARAMS),
    # Momenta in step
    "`every` must lie in [1, 2147483647]; got 0.": lambda: dl.synchronize_momentum(
        dl.distributed_lion(0.1), 0
    ),
    "`every` must be a static Python int; got 1.5.": lambda: dl.synchronize_momentum(
        dl.distributed_lion(0.1), 1.5
    ),
    "`tx` holds no vote, whose momenta could be averaged": lambda: dl.synchronize_momentum(
        optax.lion(0.1), 4
    ).init(PARAMS),
    # Parameters
    "`params[1]` has dtype int32 ... Keep what is not trained out of": init(floats, ints),
    "`params[0]` has dtype complex64 ... split complex numbers in two": init(1j * floats),
    "`params[0]`: the momentum's dtype must be ... got float16. ... mu_dtype=jnp.bfloat16": init(
        floats.astype(jnp.float16)
    ),
    # Optax's own, from the weight decay.
    "requires the current value of parameters, but you are not passing `params`": vote(
        dl.distributed_lion(0.1), params=None
    ),
    # Axes and workers
    "`axis_name` 'data' is not bound here ... jax.shard_map ... pass axis_name=None": unbound,
    "`axis_name` 'dta' is not bound here ... check the spelling": vote(axis_name="dta"),
    "'dta' is not bound here ... jax.pmap(..., axis_name='dta')": vote(dl.average_gradients("dta")),
    "`axis_name` 'data' has 1 worker ... axis_name=None ... allow_single_worker=True": vote(
        g=jax.tree.map(lambda x: x[:1], G)
    ),
    "`axis_name` 'x' is not an axis of the mesh, which has ('data',).": state_for_axis("x"),
    # Models that are split over other axes
    "`mesh` has axes ['x'] beside `axis_name` 'data' and `mean_axis_name` 'model'": split_step(
        split_mesh(axes=("data", "model", "x")), mean_axis_name="model"
    ),
    "`mesh` has axes ['model'] beside `axis_name` 'data', and gradients='mean'": split_step(
        gradients="mean"
    ),
    "`mesh` has Explicit axes ['data', 'model'], and a model that is split": split_step(
        split_mesh(AxisType.Explicit)
    ),
    "`mesh` has axes ['model'] beside the vote's 'data', ... tx.update(..., specs=specs)": (
        on_replicas(dl.scale_by_distributed_lion())
    ),
    "`specs` must hold a PartitionSpec for each of the 2 parameters ... got 1 leaves": on_replicas(
        dl.scale_by_distributed_lion(), specs=[P()]
    ),
    "`mesh` has Explicit axes ['model'] beside the vote's 'data', along which": on_replicas(
        dl.scale_by_distributed_lion(),
        jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto, AxisType.Explicit)),
    ),
    "`mesh` has axes ['model'] beside `axis_name` 'data', ... a compressed average looks": (
        on_replicas(baselines.compressed_average(baselines.QSGD()))
    ),
    "`specs['w']` is split over ['rows'], which are no axes of the mesh": sharded({"w": P("rows")}),
    "`specs['w']` is split over ['data'], the axis that votes ('data')": sharded({"w": P("data")}),
    "an array lies on a mesh of {'data': 4, 'model': 2}, and the step's has {'data': 2": sharded(
        placed(P("model")), split_mesh(axes=("data", "model", "x"))
    ),
    "`tx` declares no vote and no average over the workers: each replica would go": lambda: (
        dl.sharded(optax.lion(0.1), split_mesh(), PARAMS, "data").init(PARAMS)
    ),
    "`updates['b']` has shape (3,), and the gradients of 4 replicas, (4, 3), were": lambda: (
        sharded_update(PARAMS)
    ),
    "`updates['b']` has shape (2, 3), and the gradients of 4 replicas, (4, 3), were": lambda: (
        sharded_update({k: jnp.ones((2, *x.shape)) for k, x in PARAMS.items()}, given=False)
    ),
    "`batch[0]` has shape (6,): its leading axis is split over 4 replicas": lambda: (
        dl.replica_value_and_grad(loss, split_mesh(), "data")(PARAMS, jnp.ones(6))
    ),
    "`params` has no array with a sharding to read.": lambda: dl.state_specs(
        dl.distributed_lion(0.1).init(PARAMS), "data", {"w": np.ones(3)}
    ),
    "`params['w']` is split over devices: name the mesh's axis that votes": lambda: dl.wire_cost(
        placed(P("model")), 4
    ),
    "`params['w']` lies on no mesh (its sharding is None): with `axis_name` 'data'": lambda: (
        dl.wire_cost({"w": np.ones(3)}, 4, axis_name="data")
    ),
    "`n` must lie in [1, 8] ... got 9. ... ('jax_num_cpu_devices', 9)": lambda: dl.worker_mesh(9),
    "`n` must lie in [1, 8] ... got 0.": lambda: dl.worker_mesh(0),
    "`n` must lie in [1, 1] ... got None, ... n=1 asks for one worker": lambda: dl.worker_mesh(
        devices=jax.devices()[:1]
    ),
    # Gradients, states and batches
    "`updates['b']` is the same on all workers of axis 'data' (2 of 2 leaves are) ... "
    "distlion_jax.local_value_and_grad ... distlion_jax.local(params, 'data')": summed_gradients,
    "`updates` (gradients) and the state's momentum differ in structure": vote(state_of=[floats]),
    "`updates['w']` has shape (2, 3), its momentum (3, 2). ... the leading worker axis": vote(
        state_of=dict(PARAMS, w=jnp.zeros((3, 2)))
    ),
    "`updates['b']` has shape (3,), its momentum (4, 3).": vote(state_of=G),
    "`state[0].count` has shape (2,) on a worker; ... init_state": state_of_eight_on_four,
    "`state[0].count` has shape (4,); a leading axis of 8 ... init_state": step(state_workers=4),
    "`state[0].count` has shape (4,); a leading axis of 8 ... pmap_replicate": pmap_step(
        state_workers=4
    ),
    "`participating` has shape (4,); a leading axis of 8, one entry a worker": step(
        participating=floats > 0
    ),
    "`batch['x']` has 12 rows, which 8 workers cannot share equally. Use a multiple of 8": step(
        {"x": BATCH[:12]}
    ),
    "`batch` has 0 rows": step(jnp.float32(1)),
    "`batch` has 12 rows, which 8 workers cannot share": pmap_step(BATCH[:12]),
    "`batch['y']` has 8 rows, the leaves before it 16": step({"x": BATCH, "y": BATCH[:8]}),
    "`updates` is the same on all workers of axis 'data' (1 of 1 leaves": summed_then_averaged,
    "`params` differs by worker after call 1 ... with gradients='mean'.": nobody_agrees(
        "shard_map"
    ),
    "`params` differs by worker after call 1 ... average_gradients before another": nobody_agrees(
        "pmap"
    ),
    "`tx` declares no vote and no average ... distlion_jax.exchange(tx) ... 'mean'": traced_step(
        "arguments"
    ),
    "`tx` declares no vote and no average ... inside another": traced_step("closed over"),
    "`tx` declares no vote and no average ... a step that is lowered": traced_step("lowered"),
    "`tx` declares no vote and no average ... put average_gradients before": traced_step("pmap"),
    "`params` differs by worker after call 5 of this step": nobody_agrees("later"),
    "`params` differs by worker after call 5 ... average_gradients": nobody_agrees("later, pmap"),
    "`roles` is a field of Annotated, and must be an attribute ... without an annotation": (
        annotated_roles
    ),
    "`mean_axis_name` 'chipp' is not an axis of the mesh": lambda: dl.make_train_step(
        loss, dl.distributed_lion(0.1), dl.worker_mesh(8), mean_axis_name="chipp"
    ),
    "`tx` holds a vote or an average over the workers, and gradients='mean' averages": step(
        options={"gradients": "mean", "check_vma": False}
    ),
    "`participating` is for a vote; gradients='mean' takes all.": step(
        options={"gradients": "mean"}, participating=jnp.ones(8, bool)
    ),
    "`params['b']` would change shape in the step, from (3,) to (8, 3): ... init_state(tx": step(
        options={"gradients": "mean"}, tx=optax.trace(0.9)
    ),
    "the momentum of `updates['b']` must be float32 or bfloat16; got float16.": vote(
        momentum=jnp.float16
    ),
    "`b2` 0.999 is 1 in bfloat16: the momentum would never decay.": init(
        jnp.ones(3), b2=0.999, mu_dtype=jnp.bfloat16
    ),
    # Who takes part
    "`participating` must be a bool scalar ... got float32[].": vote(
        arrays={"participating": floats}
    ),
    "`participating` must be a bool scalar ... got bool[2].": vote(arrays={"participating": bools}),
    "`weight` must be an integer scalar ... got float32[].": vote(arrays={"weight": floats}),
    "`weight` must be an integer scalar ... got int32[2].": vote(arrays={"weight": ints}),
    "`weight` was passed but `max_weight` is None: pass max_weight=": vote(static={"weight": 1}),
    "`weight` must lie in [0, max_weight=3]; got 4. Raise max_weight": vote(
        static={"weight": 4}, max_weight=3
    ),
    "`weight` must lie in [0, max_weight=3]; got -1.": vote(static={"weight": -1}, max_weight=3),
    "`weight` must lie in [0, max_weight=3]; got 7.": vote(
        static={"weight": np.int64(7)}, max_weight=3
    ),
    # What a step is given
    "the step takes (params, state, batch); got 2 arguments": lambda: dl.make_train_step(
        loss, dl.distributed_lion(0.1), dl.worker_mesh(8)
    )(PARAMS, BATCH),
    "`params` holds a transformation's state: arguments are swapped": edge(
        change=lambda p, s: (s, p)
    ),
    "`params['b']` was donated to an earlier step ... donate=False": donated,
    "`participating` has shape (); a leading axis of 8 ... numpy.full(8, True)": edge(
        extra={"participating": True}
    ),
    "`partcipating` is an argument that nothing ... Did you mean `participating`?": edge(
        extra={"partcipating": np.ones(8, bool)}
    ),
    "`hessian` is an argument that nothing in `tx` reads. Votes take": edge(
        extra={"hessian": 1.0}, how="pmap"
    ),
    "`participating` did not reach every vote ... accumulate_gradients": edge(
        dropping(dl.distributed_lion(0.1)), extra={"participating": np.ones(8, bool)}
    ),
    "`participating` is for a vote; gradients='mean' takes all": edge(
        optax.sgd(0.1), "mean", extra={"participating": np.ones(8, bool)}
    ),
    "`batch` has 16 rows, which 8 workers in 3 micro-batches cannot share": edge(microbatches=3),
    "`microbatches` must lie in [1, 65536]; got 0.": edge(microbatches=0),
    "`loss_fn` must return the loss; got ((), (2, 3)) in shapes ... has_aux=True": edge(
        loss=with_aux
    ),
    "`loss_fn` must return (loss, aux), for has_aux=True; got () in shapes": edge(has_aux=True),
    "`loss_fn` must return (loss, aux), for ... Figures are real": edge(
        loss=lambda p, x: (loss(p, x), {"phase": 1.0 + 2.0j}), has_aux=True
    ),
    "`loss_fn` must return (loss, (model_state, aux)) ... Return the model's state before aux": (
        edge(loss=lambda p, s, x: (loss(p, x), s), model_state=jnp.zeros(1), has_aux=True)
    ),
    "`model_state` changes its structure in `loss_fn`": edge(
        loss=lambda p, s, x: (loss(p, x), [s]), model_state=jnp.zeros(1)
    ),
    "inside optax.apply_if_finite, which lets each worker decide": edge(
        optax.apply_if_finite(dl.distributed_lion(0.1), 3)
    ),
    "inside the should_skip_update_fn of optax.MultiSteps, which lets": edge(
        skipping(dl.distributed_lion(0.1))
    ),
    "`should_skip_update_fn` <function skip_not_finite": edge(
        optax.MultiSteps(dl.distributed_lion(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    ),
    "`params['b']` would differ by worker ... ScaleByAdamState keep arrays": edge(optax.adam(0.1)),
    "`state[1].measurements['n']` is there before or after ... optax.snapshot": edge(
        optax.chain(dl.distributed_lion(0.1), optax.monitor({"n": optax.tree.norm}))
    ),
    "carry input and carry output ... pass check_vma=False to make_train_step": edge(
        loss=recurrent
    ),
    "`state` was torn: its 8 rows are the momenta of 1 of the 8 workers": edge(
        calls=2, change=unreplicated
    ),
    "`state` has the leaves ... in other containers": edge(
        change=lambda p, s: (p, list(s)), calls=2
    ),
    "`state` is not of this `tx`: it lacks": edge(change=regrouped),
    "`labels` name the groups ['average', 'majority'], and the state has": relabelled,
    "`axis_name` ('data', 'local') joins axes that JAX cannot send words over": (
        both_kinds_of_axes
    ),
    # States that go on elsewhere
    "`state` has no worker axis: it is one worker's": lambda: dl.resize_state(
        dl.distributed_lion(0.1).init(PARAMS), dl.worker_mesh(4)
    ),
    "`state` has a leaf of shape (3,); a leading axis of 8": lambda: dl.resize_state(
        dl.init_state(dl.scale_by_distributed_lion(), PARAMS, dl.worker_mesh(8))._replace(
            mu={"w": jnp.zeros(3)}
        ),
        dl.worker_mesh(4),
    ),
    "`how` must be one of 'mean', 'rows'; got 'sum'": lambda: dl.resize_state(
        dl.init_state(dl.distributed_lion(0.1), PARAMS, dl.worker_mesh(8)),
        dl.worker_mesh(4),
        how="sum",
    ),
    "`state` holds no state of optax.scale_by_lion": lambda: dl.from_lion_state(
        optax.adam(0.1).init(PARAMS), dl.worker_mesh(8)
    ),
    "`state` holds no state of a vote": lambda: dl.to_lion_state(optax.lion(0.1).init(PARAMS)),
    "`learning_rate` has shape (8,); one number": lambda: dl.set_hyperparams(
        optax.inject_hyperparams(dl.distributed_lion)(0.1).init(PARAMS),
        learning_rate=jnp.arange(8.0),
    ),
    "`lerning_rate` is no injected hyperparameter of this state, which has ['b1'": lambda: (
        dl.set_hyperparams(
            optax.inject_hyperparams(dl.distributed_lion)(0.1).init(PARAMS), lerning_rate=1.0
        )
    ),
    "`learning_rate` follows a schedule, which sets it anew": lambda: dl.set_hyperparams(
        optax.inject_hyperparams(dl.distributed_lion)(optax.constant_schedule(0.1)).init(PARAMS),
        learning_rate=1.0,
    ),
    "`state` holds 4 rows of a state that 8 workers made ... process_allgather": lambda: (
        dl.resize_state(marked(4, range(4), 8), dl.worker_mesh(2))
    ),
    "`state` holds 4 rows of a state that 2 workers made, or rows": lambda: dl.resize_state(
        marked(4, [0, 1, 0, 0], 2)._replace(stamp=np.int32([[0, 2], [1, 2], [0, 0], [0, 0]])),
        dl.worker_mesh(2),
    ),
    "`params['b']` lies on 4 devices, and the step runs on 8": edge(
        change=lambda p, s: (dl.replicate(PARAMS, dl.worker_mesh(4)), s)
    ),
    "`state` has a replicated part of shape (8, 3), all rows alike: one copy, or the 8": lambda: (
        dl.resize_state(
            dl.state_like(
                optax.chain(dl.distributed_lion(0.1), dl.replicated(optax.trace(0.9))),
                {"w": np.ones((8, 3))},
                8,
            ),
            dl.worker_mesh(4),
        )
    ),
    "`n` must lie in [1, 16777216]; got 0": lambda: dl.state_like(
        dl.distributed_lion(0.1), PARAMS, 0
    ),
    "`state` was torn: some of its 4 rows are there twice": lambda: dl.to_lion_state(
        (marked(4, [0, 1, 1, 3], 4),)
    ),
    "the state's `mu['b']` is bfloat16, and `tx` makes float32: mu_dtype": edge(
        change=lambda p, s: (p, as_bfloat16(s)), calls=2
    ),
    "`model_state` would change shape in the step, from (3,) to (). Return statistics": edge(
        loss=lambda p, s, x: (loss(p, x), x.mean()), model_state=jnp.zeros(3)
    ),
    "inside optax.conditionally_transform (or _mask), and the step was given": edge(
        optax.conditionally_transform(dl.distributed_lion(0.1), lambda step: step >= 0),
        extra={"participating": np.ones(8, bool)},
    ),
    "`participating` is an argument that nothing in `tx` reads": edge(
        optax.chain(dl.exchange(optax.stateless(mean_of_all)), optax.scale(-0.1)),
        extra={"participating": np.ones(8, bool)},
    ),
    "`rows['x']` has 7 rows, which cannot be split into the 8 equal parts": lambda: (
        dl.make_global_batch({"x": np.ones((7, 3))}, dl.worker_mesh(8))
    ),
    # Several processes
    "process 1 raised in call 2 of the step, and process 0 waits in call 3: ValueError: x": (
        waiting(Word("raised", 1, 2, "ValueError: x"), 5.0)
    ),
    "process 1 ended after 2 calls of the step, and process 0 waits in call 3. Give all": (
        waiting(Word("ended", 1, 2, ""), 5.0)
    ),
    "process 1 was given other shapes, or a state (or parameters) ... call 3; process 0": waiting(
        Word("new3", 1, 3, "{}"), 5.0
    ),
    "process 1 has given no sign of life for 60 s ... in call 3 of the step": waiting(
        Word("alive", 1, 2, "17"), 60.0
    ),
    "`coordinator_address` must be host:port; got 'here'.": lambda: dl.join("here", 2, 1),
    "`process_id` must lie in [0, num_processes=2); got 2.": lambda: dl.join("here:1", 2, 2),
    "go together; got ('here:1', None, 1). Give all, or none": lambda: dl.join("here:1", None, 1),
    "process 1 of 2 could not start: process 0 did not answer (at 127.0.0.1:1, in 0.1 s)": (
        lambda: dl.join("127.0.0.1:1", 2, 1, timeout=0.1)
    ),
}


@functools.cache
def raised(text):
    """The error that the case raises, and the lines of the package that it came through."""
    with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError)) as info:
        CASES[text]()
    frames = traceback.extract_tb(info.value.__traceback__)
    ours = [(Path(f.filename), f.lineno) for f in frames if ROOT in Path(f.filename).parents]
    return str(info.value), ours


@pytest.mark.parametrize("text", CASES)
def test_message(text):
    message, _ = raised(text)
    assert re.search(".*".join(map(re.escape, text.split(" ... "))), message, re.DOTALL)


RAISES = [
    pytest.param(path, node, id=f"{path.stem}:{node.lineno}")
    for path in sorted(ROOT.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Raise) and node.exc  # a bare one has no text of its own
]


# Raised only in several processes: tests/test_company.py matches their texts.
IN_COMPANY = (
    "is an array of this process alone",
    "claims to be the same on several",
    "differs by process before",
    "differs between process",
    "leaves out axes of the mesh",
    "pmap takes as many",
    "holds no device of this process",
    "failed[0]",
)


@pytest.mark.parametrize(("path", "node"), RAISES)
def test_every_raise_has_a_case(path, node):
    if any(sign in ast.unparse(node) for sign in IN_COMPANY):
        return
    places = {place for text in CASES for place in raised(text)[1]}
    assert any((path, line) in places for line in range(node.lineno, node.end_lineno + 1))


@pytest.mark.parametrize("how", ["shard_map_unchecked", "pmap"])
def test_a_bad_gradient_stops_nobody(how):
    """One worker's NaN: the others do not wait for it, and vote as if it were not there.

    A transformation that decides *for one worker* whether to communicate, as
    ``optax.apply_if_finite`` around the vote would, leaves the others waiting for ever here.
    """
    tree, n = TREES["small"], 4
    bad = [gradients(tree, n, seed) for seed in (0, 1)]
    others = [{name: g[:-1] for name, g in one.items()} for one in bad]
    bad[0]["rows"][-1, 3, 7] = np.nan
    bad[1]["a"][-1, 0, 0] = -np.inf
    for (got, state), (want, alone) in zip(
        run(tree, n, 2, how, grads=bad), run(tree, n - 1, 2, how, grads=others), strict=True
    ):
        assert list(state.health.voted) == [True, True, True, False]
        assert list(state.health.voters) == [n - 1] * n
        for name in tree:
            np.testing.assert_array_equal(got[name], np.stack([want[name][0]] * n))
            np.testing.assert_array_equal(state.mu[name][:-1], alone.mu[name])
            assert not state.mu[name][-1].any()
