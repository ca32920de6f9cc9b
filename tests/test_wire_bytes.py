# SPDX-License-Identifier: Apache-2.0
"""What the ledger predicts, and the collectives in the compiled program: the same, exactly."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from tests.helpers import TREES, map_workers, shapes_to_params, stack_state

TRANSPORTS = ("all_gather", "two_phase", "psum")
PHASES = {"all_gather": 1, "two_phase": 2}  # collectives of one step, any tree
VOTES = (
    dict(aggregation="majority", ties="zero"),
    dict(aggregation="majority", ties="coin"),
    dict(aggregation="average"),  # ties do not occur
)
BALLOTS = ("binary", "ternary")
HEALTH = ("off", "total", "leaf")
SMALL = {"flat": (4097,), "tail": (3, 5)}
BIG = {"w": (2048, 1024), "k": (1024, 2048), "b": (1000,)}  # 4.2 M parameters
MODEL = {"w": (64, 300), "u": (300, 40), "b": (300,)}
METRICS_BYTES = 200  # what a train step may receive beside the vote, in scalars

# LLVM's optimisations, which come after the collectives are settled, take most of the time.
QUICK = {"xla_backend_optimization_level": 0}


def lowered_update(how, n, tree, tx):
    """The update alone, of n workers."""
    params = shapes_to_params(tree)
    grads = jax.tree.map(lambda x: jnp.stack([x] * n), params)
    mapped = map_workers(lambda g, state: tx.update(g, state, params), how, n)
    return mapped.lower(grads, stack_state(tx, params, n))


def assert_as_predicted(compiled, cost, n):
    """The program's collectives are the cost's: operations, dtypes, elements, groups, bytes."""
    found = dl.compiled_collectives(compiled, n)
    assert sorted(found) == sorted(cost.collectives)
    assert sum(c.bytes_received for c in found) == cost.bytes_received


def check_update(how="shard_map", n=8, tree=SMALL, compiler_options=QUICK, **options):
    tx = dl.scale_by_distributed_lion(**options)
    lowered = lowered_update(how, n, tree, tx)
    cost = dl.wire_cost(shapes_to_params(tree), n, **options)
    assert_as_predicted(lowered.compile(compiler_options=compiler_options), cost, n)
    return cost


def cases():
    """All of them; the oracle, which is slow to compile, in full with the slow tests only."""
    for transport, vote, ballot, health in itertools.product(TRANSPORTS, VOTES, BALLOTS, HEALTH):
        rare = transport == "psum" and (ballot == "ternary" or health == "leaf")
        yield pytest.param(
            dict(transport=transport, ballot=ballot, health=health, **vote),
            marks=[pytest.mark.slow] if rare else [],
            id="-".join([transport, *vote.values(), ballot, health]),
        )


@pytest.mark.parametrize("options", list(cases()))
def test_update_moves_what_is_predicted(options):
    check_update(**options)


@pytest.mark.parametrize("how", ["shard_map_unchecked", "pmap"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_however_it_is_mapped(transport, how):
    check_update(how, transport=transport)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_one_collective_a_phase_and_not_one_a_tensor(transport):
    """Many leaves, default compiler options."""
    cost = check_update(tree=TREES["mixed"], compiler_options=None, transport=transport)
    assert len(cost.collectives) == PHASES[transport]


@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_chunks_are_collectives_and_cost_no_byte(transport):
    whole = dl.wire_cost(shapes_to_params(SMALL), 8, transport=transport)
    cost = check_update(compiler_options=None, transport=transport, chunks=5)
    assert len(cost.collectives) == 5 * PHASES[transport]
    assert cost.bytes_received == whole.bytes_received


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_noise_costs_a_number_a_leaf(transport):
    quiet = dl.wire_cost(shapes_to_params(SMALL), 8, transport=transport)
    cost = check_update(transport=transport, noise=2.0)
    (scales,) = set(cost.collectives) - set(quiet.collectives)
    assert scales == ("all-reduce", "f32", 3, 8)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (2, dict(transport="auto")),
        (2, dict(transport="two_phase", aggregation="average")),
        (4, dict(transport="auto", ties="coin")),
        (4, dict(transport="all_gather", aggregation="average", ballot="ternary")),
        (4, dict(transport="two_phase", aggregation="average", max_weight=5)),
        (8, dict(transport="two_phase", aggregation="average", ties="coin")),
        (
            8,
            dict(transport="psum", max_weight=15, health="off", ties="coin"),
        ),  # 8 * 15 still fits a signed byte,
        (8, dict(transport="psum", max_weight=16, health="off", ties="coin")),  # 8 * 16 does not
    ],
)
def test_other_numbers_of_workers_and_weights(n, options):
    check_update(n=n, tree={"w": (33, 128)}, **options)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["u"]) ** 2)


def compiled_step(tx, n=8, **options):
    """A whole train step, compiled: model, gradients, vote, metrics."""
    mesh = dl.worker_mesh(n)
    step = dl.make_train_step(loss, tx, mesh, **options)
    params = shapes_to_params(MODEL)
    averaged = options.get("gradients") == "mean"
    state = dl.replicate(tx.init(params), mesh) if averaged else dl.init_state(tx, params, mesh)
    batch = jnp.ones((2 * n, 64))
    lowered = step.lower(dl.replicate(params, mesh), state, batch)
    return lowered.compile(compiler_options=QUICK)


def beside(found, expected):
    """What was found and not expected, after checking that all that was expected was found."""
    rest = collections.Counter(found)
    rest.subtract(expected)
    assert min(rest.values()) >= 0, f"{expected} predicted, {found} in the program"
    return list(rest.elements())


@pytest.mark.parametrize(
    ("transport", "aggregation", "check_vma"),
    [
        ("two_phase", "majority", True),
        ("two_phase", "average", True),
        ("two_phase", "majority", False),
        ("all_gather", "majority", True),
        ("all_gather", "average", False),
        ("psum", "majority", True),
    ],
)
def test_train_step_adds_only_scalars(transport, aggregation, check_vma):
    options = dict(transport=transport, aggregation=aggregation)
    tx = dl.distributed_lion(optax.linear_schedule(1e-3, 0.0, 100), **options)
    found = dl.compiled_collectives(compiled_step(tx, check_vma=check_vma), 8)
    cost = dl.wire_cost(shapes_to_params(MODEL), 8, **options)
    rest = beside(found, cost.collectives)
    assert {c.op for c in rest} == {"all-reduce"}
    assert 0 < sum(c.bytes_received for c in rest) < METRICS_BYTES
    assert not [c for c in found if "f" in c.dtype and c.elements > METRICS_BYTES // 4]


def assert_full_precision(compiled):
    """Every gradient crosses as float32, and the bytes are those of full_precision_cost."""
    cost = dl.full_precision_cost(shapes_to_params(MODEL), 8)
    (ring,) = cost.collectives
    floats = [c for c in dl.compiled_collectives(compiled, 8) if c.dtype == "f32"]
    assert {(c.op, c.workers) for c in floats} == {("all-reduce", 8)}
    sizes = collections.Counter(c.elements for c in floats)
    for shape in MODEL.values():
        assert sizes[int(np.prod(shape))] == 1
    scalars = sum(c.elements for c in floats) - ring.elements
    assert 0 <= scalars < METRICS_BYTES // 4
    extra = sum(c.bytes_received for c in floats) - cost.bytes_received
    assert 0 <= extra < METRICS_BYTES


def test_averaged_gradients_are_seen_as_floats():
    """The reader can see what the other tests say is not there."""
    assert_full_precision(compiled_step(optax.lion(1e-3), gradients="mean"))


def test_summing_by_autodiff_is_seen_as_floats():
    """The trap: shard_map's check makes jax.grad of replicated parameters sum over workers."""
    mesh, params = dl.worker_mesh(8), shapes_to_params(MODEL)
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert_full_precision(jax.jit(mapped).lower(params, jnp.ones((16, 64))).compile())


LABELS = {"w": "majority", "k": "average", "norm": "full", "bias": "full", "table": "frozen"}
LABELLED = {"w": (64, 300), "k": (40, 130), "norm": (300,), "bias": (7,), "table": (64, 128)}


@pytest.mark.parametrize("transport", ["two_phase", "all_gather"])
def test_labels_move_what_is_predicted(transport):
    options = dict(transport=transport, ties="coin", health="off")
    tx = dl.distributed_lion_by_label(1e-3, LABELS, **options)
    compiled = lowered_update("shard_map", 8, LABELLED, tx).compile(compiler_options=QUICK)
    found = dl.compiled_collectives(compiled, 8)
    cost = dl.wire_cost_by_label(shapes_to_params(LABELLED), LABELS, 8, **options)

    def totals(collectives):  # full-precision leaves are summed leaf by leaf: compare totals
        elements = collections.Counter()
        for c in collectives:
            elements[c.op, c.dtype, c.workers] += c.elements
        return elements

    assert totals(found) == totals(cost.collectives)
    votes = sorted(c for c in cost.collectives if c.dtype == "u32")
    assert sorted(c for c in found if c.dtype == "u32") == votes
    assert len(votes) == 2 * PHASES[transport]
    # 307 parameters; the weights of those in their mean, and how many they are.
    assert totals(found)["all-reduce", "f32", 8] == 307 + 2


def test_the_headline():
    """A bit up and a bit down: 2 (n-1)/n bits a parameter within 2 %, in the compiled program."""
    options = dict(transport="two_phase", ties="coin", health="off")
    cost = check_update(tree=BIG, **options)
    assert cost.parameters > 4_000_000
    assert cost.bits_per_parameter == pytest.approx(2 * 7 / 8, rel=0.02)
    assert dl.wire_cost(shapes_to_params(BIG), 8, **options | {"transport": "auto"}) == cost


def test_the_headline_of_the_average():
    """A bit up, and a count of up to 8 down, in 4 bits."""
    cost = check_update(tree=BIG, transport="two_phase", aggregation="average", health="off")
    assert cost.bits_per_parameter == pytest.approx((1 + 4) * 7 / 8, rel=0.02)


def test_two_phase_is_flat_in_the_number_of_workers():
    params = {"w": jax.ShapeDtypeStruct((8192, 16384), jnp.float32)}
    for n in range(2, 65):
        bits = {
            transport: dl.wire_cost(params, n, transport=transport, ties="coin").bits_per_parameter
            for transport in ("two_phase", "all_gather", "auto")
        }
        assert bits["two_phase"] == pytest.approx(2 * (n - 1) / n, rel=0.02)
        assert bits["all_gather"] == pytest.approx(n - 1, rel=0.02)
        assert bits["auto"] == min(bits.values())


def test_reader_knows_every_operation_and_group():
    """Groups within a mesh, operand conventions and bytes of each collective that JAX has."""
    mesh = jax.make_mesh((2, 4), ("slice", "chip"), axis_types=(AxisType.Auto,) * 2)
    both = ("slice", "chip")

    def one(x):
        x = x[0]
        return (
            jax.lax.psum(x, "slice"),
            jax.lax.all_gather(x.astype(jnp.int16), "chip"),
            jax.lax.all_to_all(x.reshape(8, 8), both, 0, 0),
            jax.lax.psum_scatter(x, "chip"),
            jax.lax.ppermute(x, "chip", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        )

    mapped = jax.shard_map(one, mesh=mesh, in_specs=P(both), out_specs=P(both), check_vma=False)
    found = dl.compiled_collectives(jax.jit(mapped).lower(jnp.ones((8, 4, 16))).compile(), 8)
    want = {  # received: 2 (n-1)/n b, (n-1) b, (n-1)/n b, (n-1)/n b, b
        dl.Collective("all-reduce", "f32", 64, 2): 256,
        dl.Collective("all-gather", "s16", 64, 4): 3 * 128,
        dl.Collective("all-to-all", "f32", 64, 8): 7 * 32,
        dl.Collective("reduce-scatter", "f32", 64, 4): 192,
        dl.Collective("collective-permute", "f32", 64, 8): 256,
    }
    assert {c: c.bytes_received for c in found} == want
    assert len(found) == len(want)


HLO = """
ENTRY %main (p: u32[647]) -> (u32[4,647], f32[40]) {
  %p = u32[647]{0:T(1024)} parameter(0)
  %g = f32[40]{0} constant({...})
  %h = f32[3,5]{1,0} constant({...})
  %all-gather-start = (u32[647]{0}, u32[4,647]{1,0}) all-gather-start(%p), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  %ar = (f32[40]{0:T(128)S(1)}, /*index=1*/f32[3,5]{1,0}) all-reduce-start(%g, /*index=1*/%h), \
replica_groups={}, to_apply=%add, metadata={op_name="jit(f)/all-reduce(x), y"}
  %all-gather-done = u32[4,647]{1,0} all-gather-done(%all-gather-start), metadata={op_name="g"}
  %ar-done = (f32[40]{0:T(128)S(1)}, f32[3,5]{1,0}) all-reduce-done(%ar)
  %x = f32[40]{0} get-tuple-element(%ar-done), index=0
  ROOT %t = (u32[4,647]{1,0}, f32[40]{0}) tuple(%all-gather-done, %x)
}
"""


def test_reader_counts_an_asynchronous_pair_once():
    """The form of GPU programs, which cannot be compiled here: start and done, iota groups."""
    assert dl.compiled_collectives(HLO, 8) == [
        dl.Collective("all-gather", "u32", 647, 4),
        dl.Collective("all-reduce", "f32", 40, 8),
        dl.Collective("all-reduce", "f32", 15, 8),
    ]
