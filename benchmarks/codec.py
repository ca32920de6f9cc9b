# SPDX-License-Identifier: Apache-2.0
"""What turning floats into votes and back costs, by stages, and counting at n = 8, 32, 128.

    python benchmarks/codec.py            # all cores
    taskset -c 0 python benchmarks/codec.py   # one core, the README's figure

Stages: cast (blend, pack, presence, finite check), count (tally of n ballots and the verdict, as a
worker does under each transport), apply (unpack, weight decay, learning rate). No collective runs:
ballots of other workers are random words; ties take coins, health is off. What they take of a
training step is told against the gradient of a transformer of about the same size
(examples/models.py: needs Flax), in the same run.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import timing
from update import make_tree

from distlion_jax import ballot, ledger, tally, vote, words
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


def stages(millions: float, rounds: int) -> dict[str, Any]:
    """Times cast, count (n = 8, two_phase's share) and apply on one tree."""
    grads, mu = make_tree(millions, jnp.float32, 1), make_tree(millions, jnp.float32, 2)
    flat, treedef = jax.tree.flatten(grads)
    layout = words.Layout([x.shape for x in flat])
    one, zero = jnp.int32(1), jnp.int32(0)
    tail = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-4))

    def cast(g: Any, m: Any) -> Any:
        return ballot.cast(
            layout, jax.tree.leaves(g), jax.tree.leaves(m), RULES, 0.9, 0.0, one, zero, zero
        )

    def apply(p: Any, planes: Any) -> Any:
        verdict = vote.Verdict(planes, one, one, zero, zero)
        direction = vote.decode(verdict, layout, RULES, [x.dtype for x in flat])
        updates, _ = tail.update(treedef.unflatten(direction), tail.init(p), p)
        return (optax.apply_updates(p, updates),)

    mine = jax.jit(cast)(grads, mu)
    ballots = random_ballots(0, 8, ledger.slice_groups(layout, 8))
    planes = (mine.votes, mine.present)
    count, cast_jit = jax.jit(judge), jax.jit(cast)
    apply_jit = jax.jit(apply, donate_argnums=0)
    runs = {
        "cast": lambda: cast_jit(grads, mu),
        "count, n=8": lambda: count(ballots),
        "apply": timing.donating(apply_jit, (make_tree(millions, jnp.float32, 3),), planes),
    }
    times = timing.paired(runs | {"gradient": gradient(millions)}, rounds)
    model = times.pop("gradient")
    median = {name: timing.quartiles(t)[1] for name, t in times.items()}
    sums = [sum(t, 0.0) for t in zip(*times.values(), strict=True)]
    total = timing.quartiles(sums)
    share = timing.quartiles([100 * c / (c + m) for c, m in zip(sums, model, strict=True)])
    rates = sorted(layout.size / t / 1e9 for t in total)
    print(f"\ncodec, {layout.size / 1e6:.1f} M parameters, float32, {rounds} rounds")
    for name, t in median.items():
        print(f"  {name:12} {1e3 * t:7.2f} ms   {layout.size / t / 1e9:6.2f} G parameters/s")
    print(f"  {'all together':12} {1e3 * total[1]:7.2f} ms   {rates[1]:6.2f} G parameters/s"
          f" ({rates[0]:.2f}-{rates[2]:.2f})")  # fmt: skip
    print(f"  of a training step of {SEQUENCES} x {CONTEXT} characters a worker (gradient "
          f"{1e3 * timing.quartiles(model)[1]:.0f} ms): {share[1]:.1f} % "
          f"({share[0]:.1f}-{share[2]:.1f})")  # fmt: skip
    return {"parameters": layout.size, "ms": {k: 1e3 * t for k, t in median.items()},
            "giga_parameters_per_second": rates, "percent_of_a_step": share}  # fmt: skip


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
    results = {
        "stages": stages(args.millions, args.rounds),
        "counting": counting(args.counting_millions, args.rounds),
    }
    timing.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
