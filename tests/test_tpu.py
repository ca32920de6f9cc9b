# SPDX-License-Identifier: Apache-2.0
"""Real TPU programs, compiled for eight v5e chips without having one, against the ledger.

The programs are compiled in a process of their own (:mod:`tests.tpu`).
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax.baselines import QSGD, EFSign, PowerSGD, TernGrad, TopK, compressed_average
from tests import tpu
from tests.helpers import beside

N = 8
METRICS_BYTES = 200  # what a train step may receive beside the vote, in scalars
MODEL = {"w": (256, 1024), "u": (1024, 300), "b": (1024,), "scale": ()}
MATRIX = {"w": (4096, 4096)}
STEPS = {
    f"{transport}-{aggregation}": dict(transport=transport, aggregation=aggregation)
    for transport in ("two_phase", "all_gather")
    for aggregation in ("majority", "average")
} | {
    "coin": dict(transport="two_phase", ties="coin", ballot="ternary", health="leaf"),
    "chunks": dict(transport="two_phase", chunks=3),
    "psum": dict(transport="psum"),
}
BASELINES = {
    "qsgd": QSGD(),
    "terngrad": TernGrad(),
    "ef_sign": EFSign(),
    "top_k": TopK(0.01),
    "power_sgd": PowerSGD(2),
}
UPDATES = {
    "majority": dict(transport="two_phase"),
    "average": dict(transport="all_gather", aggregation="average"),
}


def loss(params, x):
    hidden = jnp.tanh(x @ params["w"] * params["scale"] + params["b"])
    return jnp.mean((hidden @ params["u"]) ** 2)


def abstract(tree, mesh, spec, lead=()):
    """The tree's shapes as arrays on the mesh, with ``lead`` before their own axes."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=sharding), tree
    )


def shapes(tree):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in tree.items()}


def compiled_step(mesh, tx, gradients="local"):
    """A whole train step of MODEL."""
    params = shapes(MODEL)
    state = jax.eval_shape(tx.init, params)
    local = gradients == "local"
    if local:  # what is replicated has no worker axis
        specs = dl.state_specs(state)
        state = jax.tree.map(
            lambda part, spec: abstract(part, mesh, spec, (N,) if spec else ()),
            state, specs, is_leaf=lambda x: isinstance(x, dl.ReplicatedState),
        )  # fmt: skip
    else:
        state = abstract(state, mesh, P())
    batch = abstract(jax.ShapeDtypeStruct((16 * N, 256), jnp.float32), mesh, P("data"))
    step = dl.make_train_step(loss, tx, mesh, gradients=gradients)
    return step.lower(abstract(params, mesh, P()), state, batch).compile()


def compiled_update(mesh, tx):
    """The update of MATRIX alone, parameters and state donated."""
    params = shapes(MATRIX)
    state = abstract(jax.eval_shape(tx.init, params), mesh, P("data"), (N,))
    grads = abstract(params, mesh, P("data"), (N,))

    def one(params, grads, state):
        grads, state = dl.unstack((grads, state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), dl.stack(state)

    specs = (P(), P("data"), P("data"))
    mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=(P(), P("data")))
    jitted = jax.jit(mapped, donate_argnums=(0, 2))
    return jitted.lower(abstract(params, mesh, P()), grads, state).compile()


def read(compiled):
    memory = compiled.memory_analysis()
    found = dl.compiled_collectives(compiled, N)
    return {"collectives": found, "temporaries": memory.temp_size_in_bytes}


def read_all():
    mesh = Mesh(np.array(tpu.chips("v5e:2x4")), ("data",))
    assert mesh.size == N
    programs = {
        name: read(compiled_step(mesh, dl.distributed_lion(1e-3, **options)))
        for name, options in STEPS.items()
    }
    programs["orthogonalised"] = read(compiled_step(mesh, dl.distributed_muon(1e-3)))
    for name, compressor in BASELINES.items():
        tx = optax.chain(compressed_average(compressor), dl.replicated(optax.sgd(0.1, 0.9)))
        programs[name] = read(compiled_step(mesh, tx))
    bfloat16 = dl.average_gradients(wire_dtype=jnp.bfloat16)
    programs["bfloat16"] = read(compiled_step(mesh, optax.chain(bfloat16, optax.sgd(0.1))))
    programs["full"] = read(compiled_step(mesh, optax.lion(1e-3), gradients="mean"))
    for name, options in UPDATES.items():
        programs[f"update-{name}"] = read(compiled_update(mesh, dl.distributed_lion(1, **options)))
    return programs


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What was read out of each program."""
    return tpu.read_elsewhere(__name__, tmp_path_factory.mktemp("tpu"))


@pytest.mark.parametrize("name", ["orthogonalised", *(name for name in STEPS if name != "psum")])
def test_train_step_moves_what_is_predicted(programs, name):
    found = programs[name]["collectives"]
    cost = dl.wire_cost(shapes(MODEL), N, **STEPS.get(name, {}))
    rest = beside(found, cost.collectives)
    assert {c.op for c in rest} == {"all-reduce"}
    assert 0 < sum(c.bytes_received for c in rest) < METRICS_BYTES
    assert not [c for c in found if "f" in c.dtype and c.elements > METRICS_BYTES // 4]


def test_psum_moves_the_bytes_that_are_predicted(programs):
    """TPU code sums four signed bytes in a word, padded to 1024 bytes: no dtype, but the bytes."""
    cost = dl.wire_cost(shapes(MODEL), N, **STEPS["psum"])
    found = programs["psum"]["collectives"]
    assert {c.op for c in found} == {"all-reduce"}
    extra = sum(c.bytes_received for c in found) - cost.bytes_received
    assert 0 < extra < METRICS_BYTES + 2 * 1024
    assert not [c for c in found if "f" in c.dtype and c.elements > METRICS_BYTES // 4]


def test_averaged_gradients_are_seen_as_floats(programs):
    """The reader can see in TPU programs what the other tests say is not there."""
    found = programs["full"]["collectives"]
    cost = dl.full_precision_cost(shapes(MODEL), N)
    assert {(c.op, c.dtype) for c in found} == {("all-reduce", "f32")}
    extra = sum(c.bytes_received for c in found) - cost.bytes_received
    assert 0 <= extra < METRICS_BYTES


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_move_what_is_predicted(programs, name):
    found = programs[name]["collectives"]
    rest = beside(found, BASELINES[name].cost(shapes(MODEL), N).collectives)
    assert {c.op for c in rest} == {"all-reduce"}
    assert sum(c.bytes_received for c in rest) < METRICS_BYTES


def test_bfloat16_gradients_are_sent_as_such(programs):
    """Which programs for a CPU do not do."""
    found = collections.Counter()
    for c in programs["bfloat16"]["collectives"]:
        found[c.op, c.dtype] += c.elements
    (expected,) = dl.full_precision_cost(shapes(MODEL), N, "bf16").collectives
    assert found["all-reduce", "bf16"] == expected.elements


@pytest.mark.parametrize("name", UPDATES)
def test_update_moves_what_is_predicted(programs, name):
    cost = dl.wire_cost(shapes(MATRIX), N, **UPDATES[name])
    assert sorted(programs[f"update-{name}"]["collectives"]) == sorted(cost.collectives)


@pytest.mark.parametrize("name", UPDATES)
def test_update_needs_no_float_a_parameter(programs, name):
    """At most the ballots of 8 workers and 8 planes of verdict: 2 bytes a parameter, all packed.

    One temporary of 32 bits a parameter would be 4.
    """
    size = sum(math.prod(shape) for shape in MATRIX.values())
    temporaries = programs[f"update-{name}"]["temporaries"]
    print(f"\n{name}: {temporaries:,} bytes of temporaries, {temporaries / size:.3f} a parameter")
    assert temporaries <= size * (N / 8 + 8 / 8)


if __name__ == "__main__":
    tpu.write(read_all())
