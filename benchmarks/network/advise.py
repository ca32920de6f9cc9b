# SPDX-License-Identifier: Apache-2.0
"""Does it pay for my cluster? Step times with the vote and with an all-reduce, from a model.

    python -m benchmarks.network.advise --parameters 350m --workers 32 --bandwidth 1gbit \
        --step-time 0.4s
    python -m benchmarks.network.advise --parameters 7b --workers 64 --per-node 8 \
        --bandwidth 400gbit --latency 10us --tokens 8192 --plot runs/advice.png
    python -m benchmarks.network.advise --survey

The model is distlion_jax.forecast's; benchmarks.network.forecast_check says how far off it is.
"""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from distlion_jax import forecast
from distlion_jax.forecast import Forecast, Link

GAIN = 1.1  # steps a second over the best all-reduce, from which on it is worth the trouble
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
VOTES = {
    "majority, coin ties": {"ties": "coin"},
    "majority": {},
    "average": {"aggregation": "average"},
}
MUON = "D-Muon majority, coin ties"  # where the width of the matrices is known
SURVEY_MODELS = {"125m": 125e6, "1.3b": 1.3e9, "7b": 7e9, "70b": 70e9}
SURVEY_WORKERS = (8, 64, 512, 4096)
SURVEY_LINKS = {"400 Gbit/s": 400e9, "25 Gbit/s": 25e9, "1 Gbit/s": 1e9}
SURVEY_LATENCY = 10e-6
FLOPS_PER_WEIGHT = 6  # a token, forward and backward
NS_PER_WEIGHT = 30  # times the smaller side of its matrix: five steps of Newton and Schulz


def number(
    pattern: str, units: dict[str, float], what: str, least: float = 1.0
) -> Callable[[str], float]:
    """A parser of numbers with a unit, for argparse."""

    def parse(text: str) -> float:
        match = re.fullmatch(rf"([\d.]+(?:e[+-]?\d+)?){pattern}", text.strip().lower())
        try:
            value = float(match[1]) * units[match[2]] if match else math.nan
        except ValueError:
            value = math.nan
        if not (value >= least and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


_count = number(r"([kmbt]?)", UNITS, "a number of at least 1, as 350m, 7b or 7e9")
_bits = number(r"\s*([kmgt]?)bit(?:/s|ps)?", UNITS, "a bandwidth, as 100mbit or 25gbit")
_flops = number(r"([kmgt]?)", UNITS, "a positive number, as 400t or 4e14")
_time = number(r"\s*(us|ms|s)", TIMES, "a time, as 50us, 3ms or 0.4s", 0.0)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1]")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="advise.py",
        description="Step times with the one-bit vote and with an all-reduce, on your cluster, and "
        "whether it pays.",
    )
    add = p.add_argument
    add("--parameters", type=_count, metavar="N", help="of the model: 350m, 7b, 7e9")
    add("--workers", type=_whole, metavar="N", help="data-parallel workers (devices)")
    add("--bandwidth", type=_bits, metavar="X", help="of a node's link, each way: 1gbit, 400gbit")
    add("--latency", type=_time, default=0.0, metavar="T", help="between nodes (default: 0s)")
    add("--per-node", type=_whole, default=1, metavar="N",
        help="workers that share a link; inside it all is free (default: 1)")  # fmt: skip
    add("--step-time", type=_time, metavar="T", help="of a step without exchange: 0.4s, 80ms")
    add("--tokens", type=_count, metavar="N",
        help="a worker and step: estimates the step time (6 FLOP a token and weight)")  # fmt: skip
    add("--flops", type=_flops, default=4e14, metavar="X",
        help="that a worker does a second, with --tokens or --width (default: 400t)")  # fmt: skip
    add("--width", type=_count, metavar="N",
        help="smaller side of the hidden matrices: adds a row for distributed_muon, which "
        "orthogonalises them")  # fmt: skip
    add("--overlap", type=_share, default=forecast.OVERLAP, metavar="X",
        help="share of a step that hides an all-reduce; 0 on CPU (default: 0.67)")  # fmt: skip
    add("--codec", type=_time, default=forecast.CODEC, metavar="T",
        help="a parameter that the vote's update adds to Lion's (default: 9e-12 s)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="step times against bandwidth, as a PNG")
    add("--survey", action="store_true",
        help="a table of models and clusters; of the others only --tokens, --flops, "
        "--overlap and --codec matter then")  # fmt: skip
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, complete and consistent."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.plot and args.plot.suffix != ".png":
        p.error(f"--plot {args.plot}: a file whose name ends in .png is written")
    if args.survey:
        given = ("parameters", "workers", "bandwidth", "step_time", "plot")
        for name in (name for name in given if getattr(args, name) is not None):
            p.error(f"--survey has clusters of its own: leave out --{name.replace('_', '-')}")
        args.tokens = args.tokens or 8192
        return args
    lacking = [n for n in ("parameters", "workers", "bandwidth") if getattr(args, n) is None]
    if lacking:
        p.error(f"--{lacking[0]} is needed (or --survey)")
    if (args.step_time is None) == (args.tokens is None):
        p.error("either --step-time, which is better, or --tokens is needed")
    if args.workers < 2:
        p.error("--workers: at least 2, or nothing is exchanged")
    if args.workers % args.per_node:
        p.error(f"--per-node {args.per_node} does not divide --workers {args.workers}")
    if args.workers == args.per_node:
        p.error("--per-node: all workers on one node, which have no network to pay for")
    if args.step_time is None:
        args.step_time = compute_seconds(args.parameters, args)
    return args


def compute_seconds(parameters: float, args: argparse.Namespace) -> float:
    """Seconds of forward and backward pass."""
    return FLOPS_PER_WEIGHT * parameters * args.tokens / args.flops


def orthogonalising_seconds(parameters: float, args: argparse.Namespace) -> float:
    """Seconds of Newton and Schulz, as if all parameters were in matrices of that width."""
    return NS_PER_WEIGHT * args.width * parameters / args.flops


def forecasts(
    parameters: float, workers: int, link: Link, compute: float, args: argparse.Namespace
) -> dict[str, Forecast]:
    """A step by each method; the all-reduces first."""
    size, out = int(parameters), {}
    for name, dtype in (("all-reduce, float32", "f32"), ("all-reduce, bfloat16", "bf16")):
        out[name] = forecast.forecast_all_reduce(
            size, workers, link, compute, dtype=dtype, overlap=args.overlap
        )
    for name, options in VOTES.items():
        out[name] = forecast.forecast_vote(
            size, workers, link, compute, codec=args.codec, **options
        )
    if args.width:
        out[MUON] = forecast.forecast_vote(
            size, workers, link, compute, codec=args.codec, ties="coin",
            newton_schulz=orthogonalising_seconds(size, args),
        )  # fmt: skip
    return out


def seconds(value: float) -> str:
    """A time, with a unit that fits."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms"


def table(steps: dict[str, Forecast]) -> str:
    """A row a method."""
    base = steps["all-reduce, bfloat16"].step
    head = (
        "method",
        "received a step",
        "exchange",
        "of it hidden",
        "step",
        "steps/s over bfloat16",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, f in steps.items():
        cells = (name if not f.cost.transport.startswith(("all_g", "two")) else
                 f"{name} ({f.cost.transport})", f"{f.cost.bytes_received / 1e6:,.1f} MB",
                 seconds(f.exchange), seconds(f.hidden) if f.hidden else "-", seconds(f.step),
                 f"{base / f.step:.2f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bandwidth(bits: float) -> str:
    """A bandwidth, with a unit that fits."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"


def gain(steps: dict[str, Forecast]) -> float:
    """Steps a second of the majority with coin ties over the quicker all-reduce's."""
    dense = min(steps[name].step for name in steps if name.startswith("all-reduce"))
    return dense / steps["majority, coin ties"].step


def verdict(steps: dict[str, Forecast], up_to: float) -> str:
    """One sentence: whether it pays, and where that ends."""
    ratio = gain(steps)
    where = (
        "The vote is ahead at any bandwidth."
        if math.isinf(up_to)
        else f"The vote is ahead up to {bandwidth(up_to)}."
        if up_to
        else "There is no bandwidth up to which the vote is ahead."
    )
    if ratio >= GAIN:
        return f"Worth it: {ratio:.2f} times the steps per second of a bfloat16 all-reduce. {where}"
    if ratio >= 1:
        return f"Not worth it here: {ratio:.2f} times the steps per second gain nothing. {where}"
    return f"Not worth it here: {ratio:.2f} times the steps per second, that is fewer. {where}"


def plot(args: argparse.Namespace, link: Link, up_to: float) -> None:
    """Step time against bandwidth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    middle = math.log10(link.bandwidth)
    rates = [10 ** (middle - 2.5 + 0.1 * i) for i in range(51)]
    size, n, compute = args.parameters, args.workers, args.step_time
    steps = [forecasts(size, n, link._replace(bandwidth=r), compute, args) for r in rates]
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in steps[0]:
        ax.plot(
            [r / 1e9 for r in rates],
            [s[name].step for s in steps],
            label=name,
            linestyle="--" if name.startswith("all-reduce") else "-",
        )
    ax.axhline(args.step_time, color="black", linewidth=0.8, linestyle=":", label="no exchange")
    ax.axvline(link.bandwidth / 1e9, color="gray", linewidth=0.8)
    ax.annotate(" your link", (link.bandwidth / 1e9, ax.get_ylim()[1]), color="gray", va="top")
    if rates[0] < up_to < rates[-1]:
        at = forecasts(size, n, link._replace(bandwidth=up_to), compute, args)
        ax.plot(
            [up_to / 1e9],
            [at["majority, coin ties"].step],
            "ko",
            label=f"break even: {bandwidth(up_to)}",
        )
    title = f"{args.parameters / 1e6:,.0f} M parameters, {args.workers} workers"
    ax.set(xscale="log", yscale="log", xlabel="bandwidth of a node's link (Gbit/s)",
           ylabel="seconds a step", title=title)  # fmt: skip
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=140)
    plt.close(figure)


def survey(args: argparse.Namespace) -> str:
    """Steps per second over the quicker all-reduce's, for models, workers and links."""
    head = ["parameters", "GB a worker", "step without exchange"]
    pairs = list(itertools.product(SURVEY_LINKS, SURVEY_WORKERS))
    head += [f"{name}, n = {n}" for name, n in pairs]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, size in SURVEY_MODELS.items():
        compute = compute_seconds(size, args)
        cells = [model, f"{12 * size / 1e9:,.1f}", seconds(compute)]
        for name, n in pairs:
            link = Link(SURVEY_LINKS[name], SURVEY_LATENCY)
            ratio = gain(forecasts(size, n, link, compute, args))
            cells.append(f"{ratio:.2f}" if ratio >= GAIN else f"no ({ratio:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parse(argv)
    if args.survey:
        print(survey(args))
        print(
            f"\nSteps per second of the majority (coin ties) over the quicker of a float32 and a "
            f"bfloat16 all-reduce; no: less than {GAIN:g} times, not worth it. One worker a link, "
            f"{1e6 * SURVEY_LATENCY:g} us, {args.tokens:,.0f} tokens a worker at "
            f"{args.flops / 1e12:g} TFLOP/s, {args.overlap:.0%} of the step hides an all-reduce. "
            "Parameters, gradient and momentum are not sharded: GB a worker, in float32."
        )
        return 0
    link = Link(args.bandwidth, args.latency, args.per_node)
    steps = forecasts(args.parameters, args.workers, link, args.step_time, args)
    up_to = forecast.break_even(
        int(args.parameters), args.workers, link, args.step_time,
        dtype="bf16", overlap=args.overlap, codec=args.codec, ties="coin",
    )  # fmt: skip
    print(
        f"{args.parameters / 1e6:,.0f} M parameters, {args.workers} workers, {args.per_node} on a "
        f"link of {bandwidth(args.bandwidth)}, {seconds(args.latency)} of latency; "
        f"{seconds(args.step_time)} a step without exchange\n"
    )
    print(table(steps))
    print(f"\n{verdict(steps, up_to)}")
    if args.width:
        extra = orthogonalising_seconds(args.parameters, args)
        print(
            f"Orthogonalising takes {seconds(extra)} a step, {extra / args.step_time:.0%} of the "
            "rest; period=2 takes half of it, ns_steps=3 three fifths. It trains better a step: "
            "see the README."
        )
    print(
        f"Parameters, gradient and momentum take {12 * args.parameters / 1e9:,.1f} GB a worker in "
        "float32: they are not sharded."
    )
    if args.plot:
        plot(args, link, up_to)
        print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
