# SPDX-License-Identifier: Apache-2.0
"""Real TPU programs of sharded models, compiled without a TPU, against the ledger of the shards.

On one slice of eight v5e chips; and on several slices, between which arrays travel over the data
centre's network (DCN). The programs are compiled in a process of their own (:mod:`tests.tpu`).
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from tests import tpu
from tests.helpers import beside
from tests.test_shards import SHAPES, SPECS, check_moves, placed_shapes

AXES = ("replica", "fsdp", "tensor")
MESHES = {"2x2x2": (2, 2, 2), "2x4x1": (2, 4, 1), "4x2x1": (4, 2, 1)}
VOTES = {
    "majority": dict(transport="all_gather"),
    "coins": dict(transport="all_gather", ballot="ternary", ties="coin"),
    "average": dict(transport="all_gather", aggregation="average", ballot="ternary"),
    "two phases": dict(transport="two_phase", ties="coin"),
    "two phases, ternary": dict(transport="two_phase", ballot="ternary", health="leaf"),
    "two phases, average": dict(transport="two_phase", aggregation="average"),
}
TRANSPORTS = ("all_gather", "two_phase")
SLICES = (2, 4)
LAYERS = (
    {"w": (512, 256), "u": (256, 512), "b": (256,)},
    {
        "w": P("fsdp", "tensor"),
        "u": P("tensor", "fsdp"),
        "b": P(),
    },
)
TABLE = {"table": (512, 64)}, {"table": P(("fsdp", "tensor"))}
MATRIX = {"w": (4096, 4096)}, {"w": P("fsdp", "tensor")}
SHARD = 2048 * 2048  # parameters of it that a device of 2x2 holds
SCALARS = 512  # bytes: what travels between slices is padded to 128 words


def mesh_of(sizes, chips, axes=AXES):
    return Mesh(np.array(chips).reshape(sizes), axes, axis_types=(AxisType.Auto,) * len(axes))


def lion(**options):
    return dl.distributed_lion(1e-3, axis_name="replica", **options)


def perceptron(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["u"]) ** 2)


def lookup(params, tokens):
    """Which the compiler cannot split inside a replica."""
    return jnp.mean(params["table"][tokens] ** 2)


def read(compiled, mesh, params=None, **options):
    """What travels between replicas, what of it a step warns of, all that travels, and by DCN."""
    text, memory, n = compiled.as_text(), compiled.memory_analysis(), mesh.shape["replica"]
    between = "\n".join(line for line in text.splitlines() if "_xla_megascale" in line)
    cost = dl.wire_cost(params, n, axis_name="replica", **options) if params else None
    return {
        "over": [one.collective for one in dl.crossings(text, mesh)],
        "leaks": [one.collective for one in dl.leaks(compiled, mesh)],
        "every": dl.compiled_collectives(text, mesh.size),
        "dcn": dl.compiled_collectives(between, mesh.size) if between else [],
        "ledger": cost.collectives if cost else (),
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
    }


def update(mesh, model=(SHAPES, SPECS), factory=lion, **options):
    """An update alone, its state donated."""
    tx, *args = placed_shapes(factory(**options), mesh, "replica", *model)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(*args).compile()
    return read(compiled, mesh, args[-1], **options)


def step(mesh, loss, model, rows, **options):
    """A whole train step."""
    _, _, state, params = placed_shapes(lion(**options), mesh, "replica", *model)
    sharding = NamedSharding(mesh, P(("replica", "fsdp")))
    batch = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
    made = dl.make_train_step(loss, lion(**options), mesh, "replica")
    return read(made.lower(params, state, batch).compile(), mesh, params, **options)


def on_one_slice():
    chips = tpu.chips("v5e:2x4")
    for name, sizes in MESHES.items():
        for vote, options in VOTES.items():
            yield f"{vote} on {name}", update(mesh_of(sizes, chips), **options)
    mesh = mesh_of((2, 2, 2), chips)
    muon = lambda: dl.distributed_muon(1e-3, axis_name="replica")  # noqa: E731
    yield "orthogonalised", update(mesh, factory=muon)
    for transport in TRANSPORTS:
        yield f"step, {transport}", step(mesh, perceptron, LAYERS, np.zeros((16, 512), np.float32),
                                         transport=transport)  # fmt: skip
        yield f"matrix, {transport}", update(mesh, MATRIX, transport=transport)
    tx, _, _, params = placed_shapes(lion(), mesh, "replica", *MATRIX)
    yield "init", read(jax.jit(tx.init).lower(params).compile(), mesh)


def on_several_slices():
    chips = {slices: tpu.chips("v5e:2x2", num_slices=slices) for slices in SLICES}
    for slices in SLICES:
        for transport in TRANSPORTS:
            mesh = mesh_of((slices, 2, 2), chips[slices])
            yield f"{transport} on {slices} slices", update(mesh, transport=transport)
    two = dict(transport="two_phase")
    mesh = mesh_of((2, 2, 2), chips[2])
    yield "step, slices", step(mesh, perceptron, LAYERS, np.zeros((16, 512), np.float32), **two)
    yield "lookup", step(mesh, lookup, TABLE, np.zeros((16, 16), np.int32), **two)
    yield "matrix, slices", update(mesh, MATRIX, **two)
    inner = mesh.devices.transpose(1, 0, 2)
    yield "slices inside", update(mesh_of((2, 2, 2), inner, ("fsdp", "replica", "tensor")), **two)
    yield "two slices a replica", update(mesh_of((2, 4, 2), chips[4]), **two)
    yield "two replicas a slice", update(mesh_of((8, 2, 1), chips[4]), transport="all_gather")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What was read out of each program."""
    return tpu.read_elsewhere(__name__, tmp_path_factory.mktemp("tpu"))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("vote", VOTES)
def test_update_moves_the_ledger_of_the_shards(programs, mesh, vote):
    found = programs[f"{vote} on {mesh}"]
    check_moves(found["over"], found["every"], found["ledger"], VOTES[vote])
    assert found["dcn"] == []


def test_matrices_are_gathered_inside_a_replica_only(programs):
    """In floats, for the ballots that are orthogonalised. TPU code repeats what it fuses."""
    found = programs["orthogonalised"]
    gathers = [c for c in found["every"] if c.op == "all-gather" and c.dtype == "f32"]
    check_moves(found["over"], beside(found["every"], gathers), found["ledger"], {})
    # "both" along one axis and then the other; "one" is split along one.
    both, one = math.prod(SHAPES["both"]), math.prod(SHAPES["one"])
    assert {c.elements for c in gathers} == {both // 4, both // 2, one // 2}
    assert {c.workers for c in gathers} == {2}


@pytest.mark.parametrize("name", [*TRANSPORTS, "slices"])
def test_train_step_moves_scalars_beside_the_ledger(programs, name):
    found = programs[f"step, {name}"]
    rest = beside(found["over"], found["ledger"])
    assert {c.op for c in rest} == {"all-reduce"}
    assert max(c.operand_bytes for c in rest) <= (SCALARS if name == "slices" else 16)
    assert found["leaks"] == []


def test_an_activation_that_travels_between_slices_is_found(programs):
    (leak,) = programs["lookup"]["leaks"]
    assert leak in programs["lookup"]["dcn"]
    assert (leak.op, leak.dtype) == ("collective-permute", "f32")
    assert leak.operand_bytes > 4 * SCALARS


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_slices_send_one_another_the_ledger(programs, slices, transport):
    found = programs[f"{transport} on {slices} slices"]
    assert sorted(found["dcn"]) == sorted(found["ledger"])
    assert {c.workers for c in found["dcn"]} == {slices}
    check_moves(found["over"], found["every"], found["ledger"], {})


def test_order_of_the_mesh_does_not_matter(programs):
    """Groups of devices are named by their places in a slice, which are others in the mesh."""
    found = programs["slices inside"]
    assert sorted(found["dcn"]) == sorted(found["ledger"])
    check_moves(found["over"], found["every"], found["ledger"], {})


def test_what_slices_of_one_replica_send_is_not_the_votes(programs):
    found = programs["two slices a replica"]
    assert sorted(found["over"]) == sorted(found["ledger"])
    rest = collections.Counter((c.op, c.dtype) for c in beside(found["dcn"], found["ledger"]))
    flag, health, verdict = ("all-reduce", "s32"), ("all-reduce", "f32"), ("all-gather", "s8")
    assert rest == {flag: 1, health: 1, verdict: 1}


def test_replicas_that_share_a_slice_share_what_it_receives(programs):
    """One all-gather becomes two, between slices and inside them, of the same bytes together."""
    found = programs["two replicas a slice"]
    (expected,) = found["ledger"]
    between, inside = found["over"]
    assert between in found["dcn"]
    assert (between.workers, inside.workers) == (4, 2)
    assert between.elements == expected.elements
    assert between.bytes_received + inside.bytes_received == expected.bytes_received


@pytest.mark.parametrize("name", [*TRANSPORTS, "slices"])
def test_update_needs_no_number_a_parameter(programs, name):
    """Less than a byte for each parameter of the shard: all that is held is packed bits."""
    found = programs[f"matrix, {name}"]
    print(f"\n{name}: {found['temporaries'] / SHARD:.3f} bytes of temporaries a parameter")
    assert found["temporaries"] < SHARD
    assert 2 * 4 * SHARD <= found["output"] < 2 * 4 * SHARD + 16 * SCALARS  # updates and momentum


def test_init_makes_the_momentum_of_the_shard_alone(programs):
    assert 4 * SHARD <= programs["init"]["output"] < 4 * SHARD + 16 * SCALARS
    assert programs["init"]["temporaries"] == 0


if __name__ == "__main__":
    tpu.write(dict([*on_one_slice(), *on_several_slices()]))
