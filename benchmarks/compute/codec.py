# SPDX-License-Identifier: Apache-2.0
"""What turning floats into votes and back costs, by stages, and counting at n = 8, 32, 128.

    python -m benchmarks.compute.codec            # all cores, or the GPU or TPU that JAX finds
    taskset -c 0 python -m benchmarks.compute.codec   # one core

Stages: cast (blend, pack, presence, finite check), exchange (both phases of two_phase, where there
are several devices: the 8 virtual ones of a CPU, that is copies in memory), count (tally of n
ballots and the verdict, as a worker does under each transport), apply (unpack, weight decay,
learning rate), momentum. Beside each stand the bytes that it must touch, and how near it comes to
the rate of a copy in the same run. The codec (cast, count, apply) is then told as a share of a
training step, whose gradient is that of the example's models and of a larger transformer
(benchmarks.tasks.models: needs Flax). Ballots of other workers are random words; ties take coins,
health is off.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compute import timing
from benchmarks.tasks.models import ConvNet, Transformer, make_loss
from distlion_jax import worker_mesh
from distlion_jax._rules import Rules
from distlion_jax._vote import ballot, coins, tally, transports, verdict, wire, words
from distlion_jax._vote.turnout import Round

SEQUENCES, CONTEXT, CHARACTERS, IMAGES = 4, 64, 84, 16  # a worker's batch, as in examples/train.py
RULES = Rules(ties="coin", health="off")
Runs = dict[str, Callable[[], Any]]


def random_ballots(key: int, n: int, groups: int) -> ballot.Ballot:
    """Ballots of n workers with every block present."""
    votes = jax.random.bits(jax.random.key(key), (n, groups, words.BLOCK), jnp.uint32)
    present = jnp.full((n, groups, 1), 0xFFFFFFFF, jnp.uint32)
    return ballot.Ballot(votes, present, jnp.ones((n,), jnp.int32))


def judge(ballots: ballot.Ballot) -> Any:
    """Tally and verdict, as inside a transport."""
    counted = tally.count(ballots, 1)
    groups = ballots.votes.shape[1]
    return tally.majority(counted, "coin", coins.coins(jnp.int32(3), 0, 0, groups))


def models(millions: float) -> dict[str, tuple[Any, Any]]:
    """Models by name, with a worker's batch: the example's two, and one of about that size."""
    text = np.random.default_rng(4).integers(0, CHARACTERS, (SEQUENCES, CONTEXT + 1), np.int32)
    images = np.random.default_rng(5).integers(0, 256, (IMAGES, 28, 28, 1)).astype(np.uint8)
    characters = {"x": text[:, :-1], "y": text[:, 1:]}
    large = Transformer(CHARACTERS, max(1, round(millions * 1e6 / (12 * 512**2))), 512, heads=8)
    return {
        "example, text": (Transformer(CHARACTERS), characters),
        "example, images": (ConvNet(10), {"x": images, "y": np.arange(IMAGES) % 10}),
        "larger transformer": (large, characters),
    }


def like(tree: Any, key: int) -> Any:
    """Random numbers in the tree's shapes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    made = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(made)


def codec(params: Any) -> tuple[Runs, words.Layout]:
    """Cast, count and apply, each ready to run, for parameters of these shapes."""
    flat, treedef = jax.tree.flatten(params)
    layout = words.Layout([x.shape for x in flat])
    one, zero = jnp.int32(1), jnp.int32(0)
    context = Round(zero, zero, zero, one, "data", layout, RULES)
    tail = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-4))

    def cast(g: Any, m: Any) -> Any:
        leaves = jax.tree.leaves(g), jax.tree.leaves(m)
        return ballot.cast(context, *leaves, 0.9)

    def apply(p: Any, planes: Any) -> Any:
        decided = verdict.Verdict(planes, one, one, zero, zero)
        direction = verdict.decode(decided, context, [x.dtype for x in flat])
        updates, _ = tail.update(treedef.unflatten(direction), tail.init(p), p)
        return (optax.apply_updates(p, updates),)

    grads, mu = like(params, 1), like(params, 2)
    cast_jit, count = jax.jit(cast), jax.jit(judge)
    mine = cast_jit(grads, mu)
    ballots = random_ballots(0, 8, transports.slice_groups(layout, 8))
    apply_jit = jax.jit(apply, donate_argnums=0)
    planes = (mine.votes, mine.present)
    return {
        "cast": lambda: cast_jit(grads, mu),
        "count, n=8": lambda: count(ballots),
        "apply": timing.donating(apply_jit, (like(params, 3),), planes),
    }, layout


def exchange(layout: words.Layout) -> tuple[Callable[[], Any], float]:
    """Both phases of two_phase on all local devices, words only; and the bytes a parameter.

    Touched is what every worker receives, read and written once.
    """
    mesh = worker_mesh()
    cost = transports.cost(layout, mesh.size, dataclasses.replace(RULES, transport="two_phase"))
    first, second = (c.elements for c in cost.collectives)

    def both(ballots: jax.Array) -> jax.Array:
        slices = wire.scatter(ballots.reshape(mesh.size, -1), "data", [first // mesh.size])
        decided = jnp.resize(slices[0], (second,))
        return wire.gather(decided, "data", [second])[None]

    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    run = jax.jit(mapped)
    sharding = NamedSharding(mesh, P("data"))
    rows = jax.device_put(np.ones((mesh.size * mesh.size, first // mesh.size), np.uint32), sharding)
    return lambda: run(rows), 2 * mesh.size * cost.bytes_received / layout.size


def others(params: Any) -> Runs:
    """What the stages are compared with: a copy, the momentum, and the whole of optax.lion."""
    lion, grads = optax.lion(1e-4, weight_decay=0.1), like(params, 4)

    def momentum(m: Any, g: Any) -> Any:
        return (jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g, m, g),)

    def whole(p: Any, state: Any, g: Any) -> Any:
        updates, state = lion.update(g, state, p)
        return optax.apply_updates(p, updates), state

    def copy(p: Any) -> Any:
        return (jax.tree.map(lambda x: x + 1.0, p),)

    copied, moved, updated = (like(params, key) for key in (5, 6, 7))
    donated = {f: jax.jit(f, donate_argnums=0) for f in (copy, momentum)}
    step = jax.jit(whole, donate_argnums=(0, 1))
    return {
        "copy": timing.donating(donated[copy], (copied,)),
        "momentum": timing.donating(donated[momentum], (moved,), grads),
        "optax.lion": timing.donating(step, (updated, lion.init(updated)), grads),
    }


def stages(millions: float, rounds: int) -> dict[str, Any]:
    """Times the stages on matrices, against a copy of them in the same rounds."""
    params = timing.make_tree(millions, jnp.float32, 0)
    runs, layout = codec(params)
    runs = others(params) | runs
    word = 4 * (words.BLOCK + 1) / words.GROUP  # bytes of votes and presence, a parameter
    touch = {"copy": 8.0, "cast": 8 + word, "count, n=8": word + word / 8, "apply": 8 + word,
             "momentum": 12.0, "optax.lion": 20.0}  # fmt: skip
    if len(jax.devices()) > 1:
        runs["exchange"], touch["exchange"] = exchange(layout)
    times, out = timing.paired(runs, rounds), {}
    print(f"\n{layout.size / 1e6:.1f} M parameters, float32, {rounds} rounds\n")
    print("| stage      | ms      | bytes touched a parameter | GB/s   | of a copy's rate |")
    print("|------------|---------|---------------------------|--------|------------------|")
    for name, each in times.items():
        ms = 1e3 * timing.quartiles(each)[1]
        speed = touch[name] * layout.size / ms / 1e6
        pairs = zip(times["copy"], each, strict=True)
        low, near, high = timing.quartiles([touch[name] / 8.0 * c / t for c, t in pairs])
        print(f"| {name:10} | {ms:7.2f} | {touch[name]:25.2f} | {speed:6.1f} |"
              f" {near:4.2f} ({low:.2f}-{high:.2f}) |")  # fmt: skip
        out[name] = {"ms": ms, "bytes": touch[name], "of_copy": (low, near, high)}
    return {"parameters": layout.size, "stages": out}


def shares(millions: float, rounds: int) -> dict[str, Any]:
    """Times the codec beside the gradient of the models: its share of a training step."""
    print("\n| model              | parameters | gradient, ms | codec, ms | of a step, %     |")
    print("|--------------------|------------|--------------|-----------|------------------|")
    out = {}
    for name, (model, batch) in models(millions).items():
        params = jax.jit(model.init)(jax.random.key(5), batch["x"])["params"]
        step = jax.jit(jax.grad(make_loss(model)))
        runs, layout = codec(params)
        gradient = functools.partial(step, params, batch)
        times = timing.paired({"gradient": gradient, **runs}, rounds)
        sums = [sum(t, 0.0) for t in zip(*(times[stage] for stage in runs), strict=True)]
        pairs = zip(sums, times["gradient"], strict=True)
        low, share, high = timing.quartiles([100 * c / (c + g) for c, g in pairs])
        alone, ours = (1e3 * timing.quartiles(t)[1] for t in (times["gradient"], sums))
        print(f"| {name:18} | {layout.size:10,} | {alone:12.1f} | {ours:9.2f} |"
              f" {share:4.1f} ({low:.1f}-{high:.1f}) |")  # fmt: skip
        out[name] = {"parameters": layout.size, "gradient_ms": alone, "codec_ms": ours,
                     "percent": (low, share, high)}  # fmt: skip
    return out


def counting(millions: float, rounds: int) -> dict[str, Any]:
    """Times the tally of n ballots: all of them (all_gather) or an n-th (two_phase)."""
    groups = round(millions * 1e6) // words.GROUP
    count, workers = jax.jit(judge), (8, 32, 128)

    def nanoseconds(n: int, rows: int) -> float:
        """Each alone: a large one leaves cold caches and pages to free to whatever comes next."""
        ballots = random_ballots(n, n, rows)
        times = timing.paired({"count": lambda: count(ballots)}, rounds)["count"]
        return 1e9 * timing.quartiles(times)[1] / (groups * words.GROUP)

    rows = {
        "two_phase": [nanoseconds(n, -(-groups // n)) for n in workers],
        "all_gather": [nanoseconds(n, groups) for n in workers],
    }
    print(f"\ncounting at {groups * words.GROUP / 1e6:.1f} M parameters, ns a parameter")
    print("|            |" + "".join(f" n = {n:<4}|" for n in workers))
    print("|------------|" + "---------|" * len(workers))
    for transport, figures in rows.items():
        print(f"| {transport:10} |" + "".join(f" {ns:7.3f} |" for ns in figures))
    return {"workers": workers, **rows}


def main() -> int:
    """Runs the benchmark."""
    p = timing.parser(__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("--millions", type=float, default=25.0, help="millions of parameters")
    p.add_argument("--counting-millions", type=float, default=16.0, help="millions (counting)")
    args = p.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # no accelerator's are
    results = {
        **stages(args.millions, args.rounds),
        "shares": shares(args.millions, args.rounds),
        "counting": counting(args.counting_millions, args.rounds),
    }
    timing.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
