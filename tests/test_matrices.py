# SPDX-License-Identifier: Apache-2.0
"""Which leaves are hidden matrices, and which of their axes are rows and columns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Numbers

import distlion_jax as dl
from distlion_jax import matrices
from distlion_jax._batches import batch_of, numbers_of
from tests.helpers import B1, B2, map_workers, shapes_to_params, stack_state

# Axes.


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


def test_an_own_pattern():
    params = {"Dense_0": {"kernel": jnp.zeros((3, 4))}, "a": {"Dense_0": jnp.zeros((3, 4))}}
    chosen = dl.hidden_matrices(params, matrices.NOT_HIDDEN + "|^Dense_0/")
    assert chosen == {"Dense_0": {"kernel": None}, "a": {"Dense_0": Numbers()}}
