# SPDX-License-Identifier: Apache-2.0
"""The model of step times: identities, the ledger's bytes, and what was measured."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distlion_jax import break_even, forecast_all_reduce, forecast_vote, wire_cost
from distlion_jax.forecast import CODEC, Link, exchange_seconds
from distlion_jax.ledger import Collective, WireCost

ROOT = Path(__file__).resolve().parent.parent
D, N, COMPUTE = 1_000_000, 8, 0.1
LINK = Link(bandwidth=1e9)
VOTES = (dict(ties="coin"), dict(transport="all_gather"), dict(transport="psum", health="off"))


@pytest.mark.parametrize("n", [2, 8, 4096])
@pytest.mark.parametrize("options", VOTES, ids=lambda o: "-".join(o.values()))
def test_with_a_link_each_it_is_the_ledgers_bytes_over_the_bandwidth(n, options):
    params = jax.ShapeDtypeStruct((D,), jnp.float32)
    cost = wire_cost(params, n, **options)
    assert exchange_seconds(cost, LINK) == pytest.approx(8 * cost.bytes_received / 1e9, rel=1e-6)
    vote = forecast_vote(D, n, LINK, COMPUTE, **options)
    assert vote.cost == cost
    assert vote.step == COMPUTE + CODEC * D + vote.exchange


def test_every_hop_of_a_ring_pays_the_latency():
    def extra(forecast, **options):
        slow = forecast(D, N, LINK._replace(latency=1e-3), COMPUTE, **options)
        return slow.exchange - forecast(D, N, LINK, COMPUTE, **options).exchange

    assert extra(forecast_vote, transport="all_gather") == pytest.approx(7e-3)
    assert extra(forecast_vote, transport="two_phase") == pytest.approx(14e-3)
    assert extra(forecast_all_reduce) == pytest.approx(14e-3)


def test_workers_on_a_node_share_its_link():
    """A ring passes it once for all of them; an all-to-all once for each."""
    inside = LINK._replace(per_node=4)
    ring = WireCost("", D, (Collective("all-reduce", "f32", D, N),))
    assert exchange_seconds(ring, inside) == pytest.approx(8 * 2 * (1 / 2) * 4 * D / 1e9)
    gather = WireCost("", D, (Collective("all-gather", "u32", D, N),))
    assert exchange_seconds(gather, inside) == pytest.approx(8 * 4 * 4 * D / 1e9)
    each = WireCost("", D, (Collective("all-to-all", "u32", D, N),))
    assert exchange_seconds(each, inside) == pytest.approx(8 * 4 * (4 / 8) * 4 * D / 1e9)
    assert forecast_all_reduce(D, N, LINK._replace(per_node=N), COMPUTE).exchange == 0


def test_an_all_reduce_hides_behind_the_backward_pass_and_a_vote_does_not():
    fast = LINK._replace(bandwidth=1e12)
    full = forecast_all_reduce(D, N, fast, COMPUTE, overlap=0.5)
    assert full.hidden == full.exchange
    assert full.step == COMPUTE
    slow = forecast_all_reduce(D, N, LINK, COMPUTE, overlap=0.5)
    assert slow.hidden == 0.5 * COMPUTE
    assert slow.step == pytest.approx(COMPUTE + slow.exchange - 0.5 * COMPUTE)
    assert forecast_vote(D, N, fast, COMPUTE).hidden == 0


def test_sixteen_bits_are_half_of_thirty_two():
    full, half = (forecast_all_reduce(D, N, LINK, COMPUTE, dtype=t) for t in ("f32", "bf16"))
    assert half.exchange == pytest.approx(full.exchange / 2)


@pytest.mark.parametrize("per_node", [1, 4])
def test_at_the_break_even_both_take_as_long(per_node):
    link = LINK._replace(per_node=per_node, latency=1e-5)
    bits = break_even(D, N, link, COMPUTE, ties="coin")

    def gain(bandwidth):
        at = link._replace(bandwidth=bandwidth)
        full = forecast_all_reduce(D, N, at, COMPUTE)
        return full.step - forecast_vote(D, N, at, COMPUTE, ties="coin").step

    assert 1e6 < bits < 1e12
    assert gain(bits) == pytest.approx(0, abs=1e-9)
    assert gain(bits / 2) > 0 > gain(bits * 2)


def test_ahead_everywhere_or_nowhere():
    assert break_even(D, N, LINK, COMPUTE, overlap=0.0, codec=0.0) == math.inf
    assert break_even(D, N, LINK._replace(per_node=N), COMPUTE) == 0.0  # one node: no network
    late = LINK._replace(latency=1e-3)  # more bytes but fewer hops: behind where links are slow
    assert break_even(D, 64, late, 0.01, dtype="bf16", codec=0, transport="all_gather") == 0.0


def test_it_agrees_with_what_was_measured():
    """On the links that the model has not seen; the README cites the last line."""
    results = ROOT / "benchmarks" / "results" / "network.jsonl"
    command = [sys.executable, "-m", "benchmarks.network.forecast_check", str(results)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    summary = said.strip().splitlines()[-1]
    assert summary in (ROOT / "README.md").read_text()
    half = int(summary.split("at most ")[1].split("%")[0])
    assert half <= 15
