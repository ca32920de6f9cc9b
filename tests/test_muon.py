# SPDX-License-Identifier: Apache-2.0
"""Orthogonalised ballots: Newton and Schulz against an SVD, the vote against the reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from distlion_jax import matrices, reference
from distlion_jax._batches import batch_of, numbers_of
from distlion_jax._orthogonal import flops, newton_schulz
from distlion_jax.baselines import sign_muon
from tests.helpers import (
    B1,
    B2,
    assert_equal_to_reference,
    map_workers,
    run,
    run_reference,
    shapes_to_params,
    stack_state,
)
from tests.test_wire_bytes import QUICK, assert_as_predicted, lowered_update

TREE = {"rows": (16, 128), "tall": (40, 12), "bias": (33,), "scalar": ()}
HIDDEN = [1, 3]  # "rows" and "tall", among the sorted names
CLEAR = 3e-6  # a number of an orthogonalised matrix above it has a sign that rounding leaves alone
SLOW = pytest.mark.slow


def choose(params):
    return {name: Numbers() if x.ndim == 2 else None for name, x in params.items()}


def draws(tree, n, rounds, seed=0):
    """Random sixty-fourths, exact in a blend and a momentum of a few rounds; some rows are 0."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(rounds):
        one = {k: rng.integers(-64, 65, (n, *s)).astype(np.float32) / 64 for k, s in tree.items()}
        if "rows" in one:
            one["rows"][:, 4:8] = 0  # untouched rows on all workers
            one["rows"][0, 9:12] = 0  # and on one
        out.append(one)
    return out


def clear(tree, grads, hidden, ns_steps):
    """Whether rounding can turn no sign: what the comparisons below, with ==, rest on."""
    names = sorted(tree)
    mu = {k: np.zeros_like(grads[0][k]) for k in tree}
    for g in grads:
        for k in (names[j] for j in hidden):
            for c in (1 - B1) * g[k] + B1 * mu[k]:
                values = np.abs(reference.newton_schulz(c, ns_steps))
                if values[values > 0].min() < CLEAR:
                    return False
            mu[k] = B2 * mu[k] + (1 - B2) * g[k]
    return True


@functools.cache
def _clear_seed(tree, n, rounds, hidden, ns_steps):
    tree = dict(tree)
    return next(s for s in range(1000) if clear(tree, draws(tree, n, rounds, s), hidden, ns_steps))


def clear_draws(tree, n, rounds, hidden=HIDDEN, ns_steps=5):
    """The first draws that are clear."""
    seed = _clear_seed(tuple(tree.items()), n, rounds, tuple(hidden), ns_steps)
    return draws(tree, n, rounds, seed)


def both(tree, n, rounds, how="vmap", hidden=HIDDEN, chosen=choose, extra=None, **options):
    """The package and the reference, on the same gradients; compared."""
    grads = clear_draws(tree, n, rounds, hidden, options.get("ns_steps", 5))
    shared = {k: v for k, v in options.items() if k != "transport"}
    want = run_reference(tree, n, rounds, grads=grads, extra=extra, hidden=hidden, **shared)
    got = run(tree, n, rounds, how, grads=grads, extra=extra, factory=dl.scale_by_distributed_muon,
              muon_weight_dimension_numbers=chosen, **options)  # fmt: skip
    assert_equal_to_reference(tree, got, want)
    return got


# Newton and Schulz.


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 8, 20), (2, 20, 8), (1, 1, 7), (4, 33, 64)])
def test_singular_values_near_one_and_vectors_kept(shape):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.linspace(0.05, 1.0, min(shape[1:]))
    out = np.asarray(newton_schulz(jnp.asarray((u * s) @ vt, jnp.float32), 5, jnp.float32))
    inside = np.swapaxes(u, 1, 2) @ out @ np.swapaxes(vt, 1, 2)
    diagonal = np.diagonal(inside, axis1=1, axis2=2)
    assert (diagonal > 0.65).all()
    assert (diagonal < 1.25).all()
    np.testing.assert_allclose(inside, diagonal[:, None] * np.eye(len(s)), atol=2e-5)


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("shape", [(7, 7), (5, 19), (19, 5)])
def test_equals_the_reference_s_svd(shape, steps):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    got = newton_schulz(jnp.asarray(x)[None], steps, jnp.float32)[0]
    np.testing.assert_allclose(got, reference.newton_schulz(x, steps), atol=3e-5)


def test_equals_optax_s_muon():
    """Of the first update without Nesterov's momentum: what is orthogonalised is the gradient."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(12, 30)), jnp.float32)
    tx = optax.contrib.scale_by_muon(nesterov=False, weight_dimension_numbers=Numbers(), eps=0.0)
    want, _ = tx.update(x, tx.init(x))
    np.testing.assert_allclose(newton_schulz(x[None], 5, jnp.float32)[0], want, atol=2e-5)


def test_bfloat16_agrees_on_nearly_all_signs():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 64, 96)), jnp.float32)
    fine, coarse = (newton_schulz(x, 5, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert coarse.dtype == jnp.bfloat16
    assert np.mean(np.sign(fine) == np.sign(coarse.astype(jnp.float32))) > 0.97


@pytest.mark.parametrize("size", [2.0**100, 2.0**-100])
def test_size_does_not_matter(size):
    """Powers of two, whose quotients are exact; their squares would overflow, or be zeros."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, 9)), jnp.float32)
    np.testing.assert_array_equal(
        newton_schulz(x * size, 5, jnp.float32), newton_schulz(x, 5, jnp.float32)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_stay_zeros(dtype):
    x = np.random.default_rng(5).normal(size=(2, 9, 6)).astype(np.float32)
    x[0, [1, 4]], x[0, :, 2], x[1] = 0, 0, 0
    for turned in (x, x.swapaxes(1, 2)):
        out = np.asarray(newton_schulz(jnp.asarray(turned), 5, dtype).astype(jnp.float32))
        np.testing.assert_array_equal(out == 0, turned == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_matrix_nan(bad):
    x = jnp.ones((2, 3, 4)).at[0, 1, 1].set(bad)
    out = newton_schulz(x, 5, jnp.float32)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_counts_the_operations_that_xla_counts():
    """Of the products: XLA adds what is done to each number."""
    shape, steps = (2, 64, 256), 5
    f = jax.jit(lambda x: newton_schulz(x, steps, jnp.float32))
    counted = f.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().cost_analysis()["flops"]
    assert flops(shape, steps) <= counted < 1.1 * flops(shape, steps)
    assert flops(shape, steps) == flops((2, 256, 64), steps)


def test_flops_of_a_model():
    """Of hidden matrices alone, stacks too, and spread over a period."""
    params = {"w": jnp.zeros((8, 16)), "embed": jnp.zeros((99, 9)), "vector": jnp.zeros(7)}
    params["layers"] = {"w": jnp.zeros((3, 8, 16)), "bias": jnp.zeros((3, 16))}
    one = 4 * 8 * 8 * 16 + 2 * 8**3
    assert dl.newton_schulz_flops(params) == 5 * 4 * one
    assert dl.newton_schulz_flops(params, period=2) == 10 * one
    chosen = jax.tree.map(lambda x: None, params) | {"embed": Numbers()}
    assert dl.newton_schulz_flops(params, chosen, ns_steps=3) == 3 * (4 * 81 * 99 + 2 * 729)


# The vote.

RULES = [
    {"aggregation": "majority", "ties": "zero"},
    {"aggregation": "majority", "ties": "coin"},
    {"aggregation": "average"},
]


@pytest.mark.parametrize("n", [1, 2, 3, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize("ballot", ["binary", "ternary"])
@pytest.mark.parametrize("rules", RULES, ids=lambda r: "-".join(r.values()))
def test_transports_equal_reference(n, ballot, rules):
    for transport in ("all_gather", "two_phase", "psum"):
        both(TREE, n, 2, transport=transport, ballot=ballot, **rules)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
def test_every_map_equals_reference(how, transport):
    both(TREE, 8, 2, how, transport=transport, ties="coin")


def test_votes_differ_from_plain_ones():
    got = both(TREE, 3, 1)
    plain = run(TREE, 3, 1, grads=clear_draws(TREE, 3, 1))
    assert (got[0][0]["tall"] != plain[0][0]["tall"]).mean() > 0.05
    np.testing.assert_array_equal(got[0][0]["bias"], plain[0][0]["bias"])


@pytest.mark.parametrize("ns_steps", [1, 3, 7])
def test_other_numbers_of_steps(ns_steps):
    both(TREE, 3, 2, ns_steps=ns_steps)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_a_period_takes_turns(how):
    got = both(TREE, 3, 4, how, period=3)
    plain = run(TREE, 3, 4, grads=clear_draws(TREE, 3, 4))
    same = [np.array_equal(a["tall"], b["tall"]) for (a, _), (b, _) in zip(got, plain, strict=True)]
    assert same == [False, True, True, False]


def test_noise_and_dead_zone_are_of_what_is_signed():
    both(TREE, 3, 2, noise=0.5)
    both(TREE, 3, 2, ballot="ternary", threshold=0.0625)


def test_a_worker_may_sit_out_and_weigh_more():
    extra = [dict(participating=[True, False, True]), dict(weight=[3, 1, 0])]
    extra = [{"participating": [True] * 3, "weight": [1] * 3} | one for one in extra]
    both(TREE, 3, 2, extra=extra, max_weight=4)


@pytest.mark.parametrize("how", ["vmap", "shard_map", "pmap"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_worker_with_a_bad_matrix_sits_out_whole(how, bad):
    """A gradient of 3e38 is finite, and so is its vote: only what is not finite sits out."""
    n, tree = 4, TREE
    grads = draws(tree, n, 2)
    grads[0]["tall"][2, 3, 3] = bad
    options = dict(factory=dl.scale_by_distributed_muon, muon_weight_dimension_numbers=choose)
    got = run(tree, n, 2, how, grads=grads, **options)
    fine = bool(np.isfinite(np.float32(bad)))
    assert list(got[0][1].health.voted) == [True, True, fine, True]
    for direction, state in got:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((direction, state.mu)))
    if not fine:
        assert not any(got[0][1].mu[name][2].any() for name in tree)
        others = [{k: np.delete(g[k], 2, axis=0) for k in tree} for g in grads]
        want = run(tree, n - 1, 1, how, grads=others, **options)
        for name in tree:
            np.testing.assert_array_equal(got[0][0][name][0], want[0][0][name][0])


@pytest.mark.parametrize("ballot", ["binary", "ternary"])
def test_frozen_matrices_and_untouched_rows_never_move(ballot):
    tree = {"frozen": (8, 128), "rows": (16, 128)}
    grads = draws(tree, 4, 3)
    for g in grads:
        g["frozen"][:] = 0
    options = dict(factory=dl.scale_by_distributed_muon, muon_weight_dimension_numbers=choose)
    for direction, _ in run(tree, 4, 3, grads=grads, ballot=ballot, **options):
        assert not direction["frozen"].any()
        assert not direction["rows"][:, 4:8].any()
        assert direction["rows"][:, 8:].any()


def test_without_hidden_matrices_it_is_distributed_lion():
    """Bit for bit, the state too: one reads the other's checkpoints."""
    grads = draws(TREE, 4, 3)
    got = run(TREE, 4, 3, grads=grads, factory=dl.scale_by_distributed_muon,
              muon_weight_dimension_numbers=none)  # fmt: skip
    want = run(TREE, 4, 3, grads=grads)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def none(params):
    return None


def test_one_worker_needs_no_axis():
    """With b1, b2 exact, and operation by operation as the vote's is not."""
    grads = draws(TREE, 1, 3)
    params = shapes_to_params(TREE)
    alone = dl.scale_by_distributed_muon(
        B1, B2, axis_name=None, muon_weight_dimension_numbers=choose
    )
    want = run(TREE, 1, 3, grads=grads, factory=dl.scale_by_distributed_muon,
               muon_weight_dimension_numbers=choose)  # fmt: skip
    state = alone.init(params)
    assert isinstance(state, optax.ScaleByLionState)
    for g, (direction, after) in zip(grads, want, strict=True):
        updates, state = alone.update({k: v[0] for k, v in g.items()}, state)
        for name in TREE:
            np.testing.assert_array_equal(updates[name], direction[name][0])
            np.testing.assert_array_equal(state.mu[name], after.mu[name][0])


def test_rest_factor_is_a_learning_rate_of_the_other_leaves():
    grads, params = draws(TREE, 3, 1)[0], jax.tree.map(jnp.ones_like, shapes_to_params(TREE))

    def updates(**options):
        tx = dl.distributed_muon(
            0.125, B1, B2, weight_decay=0.5, muon_weight_dimension_numbers=choose, **options
        )
        return jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name="data")(grads)

    one, other = updates(), updates(rest_factor=0.25)
    for name in TREE:
        factor = 0.25 if name in ("bias", "scalar") else 1.0
        np.testing.assert_array_equal(other[name], factor * one[name])


def test_sign_muon_signs_the_momentum():
    grads = draws(TREE, 3, 2)
    params = shapes_to_params(TREE)
    options = dict(weight_decay=0.0, muon_weight_dimension_numbers=choose)
    txs = sign_muon(1.0, 0.5, **options), dl.distributed_muon(1.0, 0.5, 0.5, **options)
    steps = [map_workers(lambda g, s, tx=tx: tx.update(g, s, params), "vmap", 3) for tx in txs]
    states = [stack_state(tx, params, 3) for tx in txs]
    for g in grads:
        (one, states[0]), (two, states[1]) = (f(g, s) for f, s in zip(steps, states, strict=True))
        jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("transport", ["all_gather", "two_phase"])
@pytest.mark.parametrize("options", [{}, {"period": 2}, {"ns_dtype": jnp.bfloat16}], ids=str)
def test_moves_what_distributed_lion_moves(transport, options):
    """In the compiled program, with the ledger that knows nothing of matrices."""
    tree = {"w": (64, 40), "stack": (3, 16, 24), "bias": (40,)}
    numbers = {"w": Numbers(), "stack": Numbers(1, 2), "bias": None}
    tx = dl.scale_by_distributed_muon(
        transport=transport, muon_weight_dimension_numbers=numbers, **options
    )
    lowered = lowered_update("shard_map", 8, tree, tx)
    cost = dl.wire_cost(shapes_to_params(tree), 8, transport=transport)
    assert_as_predicted(lowered.compile(compiler_options=QUICK), cost, 8)


def test_trains_on_a_mesh_and_replicas_agree():
    mesh = dl.worker_mesh(8)
    tx = dl.distributed_muon(0.02, weight_decay=0.1)
    rng = np.random.default_rng(0)
    params = dl.replicate({"w": jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)}, mesh)
    state = dl.init_state(tx, params, mesh)
    target = rng.normal(size=(6, 9)).astype(np.float32)

    def loss(params, x):
        return jnp.mean((x @ (params["w"] - target)) ** 2)

    step = dl.make_train_step(loss, tx, mesh)
    losses = []
    for _ in range(60):
        params, state, metrics = step(params, state, rng.normal(size=(32, 6)).astype(np.float32))
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert dl.replicas_agree(params, mesh)


# Which leaves, and which of their axes.


def directions(tree, chosen, grads, **options):
    tx = dl.scale_by_distributed_muon(B1, B2, muon_weight_dimension_numbers=chosen, **options)
    params = shapes_to_params(tree)
    step = map_workers(lambda g, s: tx.update(g, s, params), "vmap", 3)
    return step(grads, stack_state(tx, params, 3))[0]


SHAPE = (4, 5, 6)
AXES = [  # numbers of a leaf of three axes, and the matrices that they make of it
    (Numbers(1, 2), lambda x: [x[i] for i in range(4)]),
    (Numbers(2, 1), lambda x: [x[i].T for i in range(4)]),
    (Numbers(0, 2), lambda x: [x[:, i] for i in range(5)]),
    (Numbers(-1, 0), lambda x: [x[:, i].T for i in range(5)]),
    (Numbers(0, (1, 2)), lambda x: [x.reshape(4, 30)]),
    (Numbers((0, 1), 2), lambda x: [x.reshape(20, 6)]),
    (Numbers((0, 2), 1), lambda x: [x.swapaxes(1, 2).reshape(24, 5)]),
]


@pytest.mark.parametrize(("numbers", "take"), AXES, ids=[str(tuple(a)) for a, _ in AXES])
def test_axes_make_matrices(numbers, take):
    (checked,) = numbers_of(numbers, [np.zeros(SHAPE)])
    batch = batch_of(SHAPE, checked)
    x = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    np.testing.assert_array_equal(batch.of(jnp.asarray(x)), np.stack(take(x)))
    np.testing.assert_array_equal(batch.back(batch.of(jnp.asarray(x))), x)


@pytest.mark.parametrize(("numbers", "take"), AXES, ids=[str(tuple(a)) for a, _ in AXES])
def test_a_leaf_votes_as_its_matrices_would(numbers, take):
    rng = np.random.default_rng(7)
    whole = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    parts = {str(i): np.stack([take(x)[i] for x in whole]) for i in range(len(take(whole[0])))}
    got = directions({"x": SHAPE}, {"x": numbers}, {"x": whole}, ballot="ternary")["x"]
    want = directions({k: v.shape[1:] for k, v in parts.items()}, Numbers(), parts,
                      ballot="ternary")  # fmt: skip
    for i, one in enumerate(take(np.asarray(got[0]))):
        np.testing.assert_array_equal(one, want[str(i)][0])


def test_a_prefix_a_function_and_none():
    params = {"a": {"w": jnp.zeros((6, 5))}, "c": jnp.zeros((5, 6))}
    two, found = Numbers(), Numbers((0,), (1,))
    assert numbers_of(two, params) == [found, found]
    assert numbers_of({"a": two, "c": None}, params) == [found, None]
    assert numbers_of(lambda p: {"a": {"w": None}, "c": two}, params) == [None, found]
    assert numbers_of(None, params) == [found, found]
    assert numbers_of(lambda p: None, params) == [None, None]


def test_parameters_may_be_missing():
    """As of a mask, or a model that is split in two."""
    params = {"a": None, "c": jnp.zeros((5, 6)), "d": optax.MaskedNode()}
    numbers = {"a": Numbers(), "c": Numbers(), "d": None}
    assert numbers_of(numbers, params) == [Numbers((0,), (1,))]
    assert numbers_of(None, params) == [Numbers((0,), (1,))]


def paths_of(params):
    """The paths that are hidden matrices, with their numbers."""
    chosen = dl.hidden_matrices(params)
    is_leaf = lambda x: isinstance(x, Numbers)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(chosen, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in found}


def initial(model, *shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape)))["params"]


HIDDEN_PATHS = [
    "blocks/0/mlp/kernel",
    "Dense_3/kernel",
    "heads/0/key/kernel",
    "w",
    "layer1/w",
    "decoder/layers/w1",
    "MultiHeadDotProductAttention_0/proj/kernel",
    "ensemble/kernel",
    "post_dense/kernel",
    "multi_head/qkv/kernel",
    "attention/head_0/query/kernel",
    "PreNormBlock_0/FF_0/Dense_0/kernel",
    "AdaLayerNorm_0/Dense_0/kernel",
    "positionwise_feed_forward/w1/kernel",
    "position_wise_ffn/w",
    "ImageClassifier_0/encoder/Dense_0/kernel",
    "text_embedder/blocks/0/w",
    "time_embedding/linear_1/w",
    "up_scale/kernel",
    "lora_a",
    "transformer/h/0/attn/c_attn/kernel",
    "model/layers/0/mlp/gate_proj/kernel",
]
OTHER_PATHS = [
    "embed/kernel",
    "Embed_0/embedding",
    "tok_emb/weight",
    "emb",
    "wte/embedding",
    "wpe",
    "pos",
    "position_embedding",
    "pos_embed",
    "lm_head/kernel",
    "head/kernel",
    "mlp_head/Dense_0/kernel",
    "LMHead_0/Dense_0/kernel",
    "classifier/kernel",
    "logits/w",
    "blocks/norm/scale",
    "LayerNorm_0/scale",
    "blocks/bias",
    "mlp/b",
    "stack/Dense_0/bias",
    "unembed/w",
    "score/kernel",
    "qa_outputs/kernel",
    "W_E",
    "attn/q_bias",
    "in_proj_bias",
    "rel_pos_bias",
    "relative_position_bias_table",
    "ln_scale",
    "layer_scale",
    "ln1/weight",
    "ln_f/g",
    "rms/weight",
    "attn/bq",
    "tokemb",
    "query_tokens",
    "cls_token",
    "codebook",
    "embeddings/word_embeddings/embedding",
    "patch_embed/kernel",
]


@pytest.mark.parametrize("path", HIDDEN_PATHS + OTHER_PATHS)
def test_names_say_what_is_hidden(path):
    tree = jnp.zeros((4, 6))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert paths_of(tree) == ({path: Numbers()} if path in HIDDEN_PATHS else {})


def test_vectors_integers_and_convolutions_are_not():
    params = {"v": jnp.zeros(3), "i": jnp.zeros((3, 4), int), "conv": jnp.zeros((3, 3, 4, 5)),
              "s": jnp.zeros(())}  # fmt: skip
    assert paths_of(params) == {}


def test_kernels_of_flax_s_attention_are_one_matrix_each():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    found = paths_of(initial(attention, 1, 4, 8))
    whole = Numbers(0, (1, 2))
    assert found == {"key/kernel": whole, "query/kernel": whole, "value/kernel": whole,
                     "out/kernel": Numbers((0, 1), 2)}  # fmt: skip
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=6, decode=False, rngs=nnx.Rngs(0)
    )
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert paths_of(state) == found


class Layer(nn.Module):
    """A block without biases but for its norm, an attention of Flax's among it."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x)
        x = nn.Dense(9, use_bias=False, name="query")(x)
        x = nn.Dense(6, use_bias=False, name="out")(x)
        return x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)(x, x), None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_stack_is_a_batch(axis):
    """On the first axis or, as MaxText has it, the second."""
    stack = nn.scan(Layer, {"params": axis}, split_rngs={"params": True}, length=4)
    params = jax.eval_shape(
        lambda: stack().init(jax.random.key(0), jnp.zeros((2, 5, 6)), None)["params"]
    )
    rows, columns = {0: (1, 2), 1: (0, 2)}[axis]
    before = {0: ((1, (2, 3)), ((1, 2), 3)), 1: ((0, (2, 3)), ((0, 2), 3))}[axis]
    attention = "MultiHeadDotProductAttention_0"
    assert paths_of(params) == {
        "query/kernel": Numbers(rows, columns), "out/kernel": Numbers(rows, columns),
        **{f"{attention}/{name}/kernel": Numbers(*before[0]) for name in ("key", "query", "value")},
        f"{attention}/out/kernel": Numbers(*before[1]),
    }  # fmt: skip


AMBIGUOUS = {
    "nothing beside it": {"w": (3, 4, 5)},
    "a norm of one layer": {"norm": {"scale": (8,)}, "q_proj": {"kernel": (8, 2, 4)}},
    "a bias of heads": {"q_proj": {"kernel": (8, 4, 4), "bias": (4, 4)}},
    "no way out": {"query": {"kernel": (8, 2, 4)}, "norm": {"scale": (8,)}},
    "experts in a stack": {"norm": {"scale": (3, 8)}, "wi": (3, 2, 8, 9)},
    "both axes": {"norm": {"scale": (3, 8)}, "w": (3, 8, 9)},
}


@pytest.mark.parametrize("tree", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_cannot_be_told_is_asked(tree):
    params = jax.tree.map(jnp.zeros, tree, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match="can be a stack of matrices as well as one matrix"):
        dl.hidden_matrices(params)


def test_convolutions_of_three_axes_are_left_out():
    assert paths_of({"Conv_0": {"kernel": jnp.zeros((3, 5, 4)), "bias": jnp.zeros(4)}}) == {}
    assert paths_of({"conv1": {"weight": jnp.zeros((4, 5, 3)), "bias": jnp.zeros((4, 1))}}) == {}


def test_names_may_hold_slashes_and_leaves_may_be_functions():
    params = {"a/b": {"w": jnp.zeros((3, 4))}, "a": {"b/w": jnp.zeros((5, 6))}, "f": jnp.tanh}
    assert dl.hidden_matrices(params) == {
        "a/b": {"w": Numbers()}, "a": {"b/w": Numbers()}, "f": None,
    }  # fmt: skip


def test_an_injected_function_is_named_static():
    """Else Optax calls it with the step, and the default choice would follow in silence."""
    mine = functools.partial(dl.hidden_matrices, exclude=".")
    options = dict(learning_rate=0.1, muon_weight_dimension_numbers=mine)
    params = shapes_to_params(TREE)
    with pytest.raises(ValueError, match=r"static_args=..muon_weight_dimension_numbers"):
        optax.inject_hyperparams(dl.distributed_muon)(**options).init(params)
    injected = optax.inject_hyperparams(
        dl.distributed_muon, static_args=("muon_weight_dimension_numbers",)
    )
    grads = draws(TREE, 3, 1)[0]

    def updates(tx):
        one = lambda g: tx.update(g, tx.init(params), params)[0]  # noqa: E731
        return jax.vmap(one, axis_name="data")(grads)

    want = updates(dl.distributed_muon(0.1, muon_weight_dimension_numbers={k: None for k in TREE}))
    jax.tree.map(np.testing.assert_array_equal, updates(injected(**options)), want)


def test_state_is_distributed_lion_s():
    """Of the whole optimizers: one reads the other's checkpoints."""
    params = shapes_to_params(TREE)
    states = [make(0.1).init(params) for make in (dl.distributed_muon, dl.distributed_lion)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_a_factor_out_of_range_moves_nothing():
    params, grads = shapes_to_params(TREE), draws(TREE, 3, 1)[0]

    def updates(factor):
        tx = dl.distributed_muon(0.1, rest_factor=factor)
        return jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name="data")(grads)

    for bad in (-1.0, float("nan"), float("inf")):
        got = jax.jit(updates)(jnp.float32(bad))
        assert not got["bias"].any()
        assert got["tall"].any()


def test_an_own_pattern():
    params = {"Dense_0": {"kernel": jnp.zeros((3, 4))}, "a": {"Dense_0": jnp.zeros((3, 4))}}
    chosen = dl.hidden_matrices(params, matrices.NOT_HIDDEN + "|^Dense_0/")
    assert chosen == {"Dense_0": {"kernel": None}, "a": {"Dense_0": Numbers()}}
