# SPDX-License-Identifier: Apache-2.0
"""What turning floats into votes and back costs, by stages, and counting at n = 8, 32, 128.

    python benchmarks/codec.py            # all cores, or the GPU or TPU that JAX finds
    taskset -c 0 python benchmarks/codec.py   # one core, the README's figure

Stages: cast (blend, pack, presence, finite check), exchange (both phases of two_phase, where there
are several devices: the 8 virtual ones of a CPU, that is copies in memory), count (tally of n
ballots and the verdict, as a worker does under each transport), apply (unpack, weight decay,
learning rate), momentum. Beside each stand the bytes that it must touch, and how near it comes to
the rate of a copy in the same run. Ballots of other workers are random words; ties take coins,
health is off. What the codec (cast, count, apply) takes of a training step is told against the
gradient of a transformer of about the same size (examples/models.py: needs Flax), in the same run.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distlion_jax import ballot, ledger, tally, vote, wire, words, worker_mesh
from distlion_jax.rules import Rules

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from models import Transformer, make_loss

WIDTH, SEQUENCES, CONTEXT, CHARACTERS = 512, 4, 64, 84
RULES = Rules(ties="coin", health="off")


def random_ballots(key: int, n: int, groups: int) -> ballot.Ballot:
    """Ballots of n workers with every block present."""
    votes = jax.random.bits(jax.random.key(key), (n, groups, words.BLOCK), jnp.uint32)
    present = jnp.full((n, groups, 1), 0xFFFFFFFF, jnp.uint32)
    return ballot.Ballot(votes, present, jnp.ones((n,), jnp.int32))


def judge(ballots: ballot.Ballot) -> Any:
    """Tally and verdict, as inside a transport."""
    counted = tally.count(ballots, 1)
    groups = ballots.votes.shape[1]
    return tally.majority(counted, "coin", words.coins(jnp.int32(3), 0, 0, groups))


def gradient(millions: float) -> Callable[[], Any]:
    """One worker's gradient: a transformer of about so many parameters, the example's batch."""
    layers = max(1, round(millions * 1e6 / (12 * WIDTH**2)))
    model = Transformer(CHARACTERS, layers, WIDTH, heads=8)
    text = jax.random.randint(jax.random.key(4), (SEQUENCES, CONTEXT + 1), 0, CHARACTERS)
    batch = {"x": text[:, :-1], "y": text[:, 1:]}
    params = jax.jit(model.init)(jax.random.key(5), batch["x"])["params"]
    step = jax.jit(jax.grad(make_loss(model)))
    return lambda: step(params, batch)


def exchange(layout: words.Layout) -> tuple[Callable[[], Any], float]:
    """Both phases of two_phase on all local devices, words only; and the bytes a parameter.

    Touched is what every worker receives, read and written once.
    """
    mesh = worker_mesh()
    cost = ledger.cost(layout, mesh.size, dataclasses.replace(RULES, transport="two_phase"))
    first, second = (c.elements for c in cost.collectives)

    def both(ballots: jax.Array) -> jax.Array:
        slices = wire.scatter(ballots.reshape(mesh.size, -1), "data", [first // mesh.size])
        verdict = jnp.resize(slices[0], (second,))
        return wire.gather(verdict, "data", [second])[None]

    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    run = jax.jit(mapped)
    sharding = NamedSharding(mesh, P("data"))
    rows = jax.device_put(np.ones((mesh.size * mesh.size, first // mesh.size), np.uint32), sharding)
    return lambda: run(rows), 2 * mesh.size * cost.bytes_received / layout.size


def candidates(millions: float) -> tuple[dict[str, Callable[[], Any]], dict[str, float], int]:
    """The stages, the bytes a parameter that each must touch, and the number of parameters."""
    grads, mu, params, updated, moved, copied = (
        timing.make_tree(millions, jnp.float32, key) for key in range(6)
    )
    flat, treedef = jax.tree.flatten(grads)
    layout = words.Layout([x.shape for x in flat])
    one, zero = jnp.int32(1), jnp.int32(0)
    tail = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-4))
    lion = optax.lion(1e-4, weight_decay=0.1)

    def cast(g: Any, m: Any) -> Any:
        return ballot.cast(
            layout, jax.tree.leaves(g), jax.tree.leaves(m), RULES, 0.9, 0.0, one, zero, zero
        )

    def apply(p: Any, planes: Any) -> Any:
        verdict = vote.Verdict(planes, one, one, zero, zero)
        direction = vote.decode(verdict, layout, RULES, [x.dtype for x in flat])
        updates, _ = tail.update(treedef.unflatten(direction), tail.init(p), p)
        return (optax.apply_updates(p, updates),)

    def momentum(m: Any, g: Any) -> Any:
        return (jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g, m, g),)

    def whole(p: Any, state: Any, g: Any) -> Any:
        updates, state = lion.update(g, state, p)
        return optax.apply_updates(p, updates), state

    mine = jax.jit(cast)(grads, mu)
    ballots = random_ballots(0, 8, ledger.slice_groups(layout, 8))
    planes = (mine.votes, mine.present)
    count, cast_jit = jax.jit(judge), jax.jit(cast)
    apply_jit, momentum_jit = (jax.jit(f, donate_argnums=0) for f in (apply, momentum))
    whole_jit = jax.jit(whole, donate_argnums=(0, 1))
    copy = jax.jit(lambda t: (jax.tree.map(lambda x: x + 1.0, t),), donate_argnums=0)
    word = 4 * (words.BLOCK + 1) / words.GROUP  # bytes of votes and presence, a parameter
    runs = {
        "copy": timing.donating(copy, (copied,)),
        "cast": lambda: cast_jit(grads, mu),
        "count, n=8": lambda: count(ballots),
        "apply": timing.donating(apply_jit, (params,), planes),
        "momentum": timing.donating(momentum_jit, (moved,), grads),
        "optax.lion": timing.donating(whole_jit, (updated, lion.init(updated)), grads),
    }
    touch = {"copy": 8.0, "cast": 8 + word, "count, n=8": word + word / 8, "apply": 8 + word,
             "momentum": 12.0, "optax.lion": 20.0}  # fmt: skip
    if len(jax.devices()) > 1:
        runs["exchange"], touch["exchange"] = exchange(layout)
    return runs, touch, layout.size


def stages(millions: float, rounds: int) -> dict[str, Any]:
    """Times the stages on one tree, against a copy of it and the gradient of a model."""
    runs, touch, size = candidates(millions)
    times = timing.paired(runs | {"gradient": gradient(millions)}, rounds)
    model = times.pop("gradient")
    codec = [times[name] for name in ("cast", "count, n=8", "apply")]
    sums = [sum(t, 0.0) for t in zip(*codec, strict=True)]
    total = timing.quartiles(sums)
    share = timing.quartiles([100 * c / (c + m) for c, m in zip(sums, model, strict=True)])
    rates = sorted(size / t / 1e9 for t in total)
    print(f"\ncodec, {size / 1e6:.1f} M parameters, float32, {rounds} rounds\n")
    print("| stage      | ms      | bytes touched a parameter | GB/s   | of a copy's rate |")
    print("|------------|---------|---------------------------|--------|------------------|")
    rows = {}
    for name, each in times.items():
        ms = 1e3 * timing.quartiles(each)[1]
        speed = touch[name] * size / ms / 1e6
        pairs = zip(times["copy"], each, strict=True)
        near = timing.quartiles([touch[name] / 8.0 * c / t for c, t in pairs])
        rows[name] = {"ms": ms, "bytes": touch[name], "gigabytes_per_second": speed, "copy": near}
        print(f"| {name:10} | {ms:7.2f} | {touch[name]:25.2f} | {speed:6.1f} |"
              f" {near[1]:4.2f} ({near[0]:.2f}-{near[2]:.2f}) |")  # fmt: skip
    print(f"\ncodec (cast, count, apply): {1e3 * total[1]:.2f} ms, {rates[1]:.2f} G parameters/s "
          f"({rates[0]:.2f}-{rates[2]:.2f}); of a training step of {SEQUENCES} x {CONTEXT} "
          f"characters a worker (gradient {1e3 * timing.quartiles(model)[1]:.0f} ms): "
          f"{share[1]:.1f} % ({share[0]:.1f}-{share[2]:.1f})")  # fmt: skip
    return {"parameters": size, "stages": rows, "giga_parameters_per_second": rates,
            "percent_of_a_step": share}  # fmt: skip


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
    p.add_argument("--millions", type=float, default=25.0, help="millions of parameters (stages)")
    p.add_argument("--counting-millions", type=float, default=16.0, help="millions (counting)")
    args = p.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # no accelerator's are
    results = {
        "stages": stages(args.millions, args.rounds),
        "counting": counting(args.counting_millions, args.rounds),
    }
    timing.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
