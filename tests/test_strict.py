# SPDX-License-Identifier: Apache-2.0
"""JAX's strict modes, which code bases switch on to find mistakes of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distlion_jax as dl
from distlion_jax import baselines
from tests.steps import MAPS, start

PARAMS = {
    "w": np.ones((40, 130), np.float32),
    "b": np.zeros(3, np.float32),
    "h": jnp.ones(20, jnp.bfloat16),
}
X = np.ones((16, 40), np.float32)
FOLLOWS = dl.replicated(optax.sgd(0.1))
PARTS = {
    "majority": lambda: dl.distributed_lion(0.1, max_weight=3),
    "average": lambda: dl.distributed_lion(0.1, aggregation="average", transport="all_gather"),
    "ternary": lambda: dl.distributed_lion(0.1, ballot="ternary", transport="psum", health="leaf"),
    "noise": lambda: dl.distributed_lion(0.1, noise=2.0, ties="coin", mu_dtype=jnp.bfloat16),
    "labels": lambda: dl.distributed_lion_by_label(
        0.1, {"w": "majority", "b": "full", "h": "average"}
    ),
    "orthogonalised": lambda: dl.distributed_muon(0.1, rest_factor=0.5, mu_dtype=jnp.bfloat16),
    "orthogonalised now and then": lambda: dl.distributed_muon(0.1, period=2, noise=1.0),
    "synchronized": lambda: dl.synchronize_momentum(dl.distributed_lion(0.1), 2),
    "accumulated": lambda: optax.MultiSteps(dl.distributed_lion(0.1), 2),
    "averaged": lambda: optax.chain(dl.average_gradients(max_weight=3), FOLLOWS),
    "warm-up": lambda: optax.chain(dl.average_gradients(steps=2), dl.distributed_lion(0.1)),
    "signum": lambda: baselines.distributed_signum(0.1),
    "full precision": lambda: baselines.full_precision_lion(0.1),
    "DGC": lambda: optax.chain(
        baselines.deep_gradient_compression(0.5, clip_norm=1.0, warmup=(0.9,)), FOLLOWS
    ),
    **{
        type(c).__name__: (lambda c=c: optax.chain(baselines.compressed_average(c), FOLLOWS))
        for c in (
            baselines.QSGD(),
            baselines.TernGrad(),
            baselines.EFSign(),
            baselines.PowerSGD(1),
            baselines.TopK(0.1),
        )
    },
}
MODES = {
    "rank": ("jax_numpy_rank_promotion", "raise"),
    "dtype": ("jax_numpy_dtype_promotion", "strict"),
}


def loss(params, x):
    rest = jnp.sum(params["b"]) + jnp.sum(params["h"]).astype(jnp.float32)
    return jnp.mean((x @ params["w"] - 1.0) ** 2) + rest


@pytest.fixture(params=MODES)
def mode(request):
    name, value = MODES[request.param]
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield request.param
    jax.config.update(name, before)


@pytest.mark.parametrize(
    ("part", "how"), [(part, "shard_map") for part in PARTS] + [("labels", x) for x in MAPS[1:]]
)
def test_trains_where_promotion_is_an_error(part, how, mode):
    step, params, state = start(loss, PARTS[part](), PARAMS, how)
    *_, metrics = step(params, state, X)
    assert np.isfinite(metrics.loss)


@pytest.mark.parametrize("how", MAPS)
def test_no_step_moves_data_behind_ones_back(how):
    step, params, state = start(loss, dl.distributed_lion(0.1), PARAMS, how)
    x = jax.device_put(X, NamedSharding(dl.worker_mesh(), P("data")))
    params, state, _ = step(params, state, x)
    params, state, _ = step(params, state, x)
    with jax.transfer_guard("disallow"):  # calls 3 and 4; the 4th looks at the parameters
        for _ in range(2):
            params, state, metrics = step(params, state, x)
    assert np.isfinite(metrics.loss)
