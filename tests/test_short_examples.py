# SPDX-License-Identifier: Apache-2.0
"""The short examples as a user runs them: a process of its own, in another folder, few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import distlion_jax as dl

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RULES = {"kernel": "majority", "bias": "full", "scale": "full"}
SHORT = ("unreliable_workers", "nodes", "by_layer", "batch_norm", "resume", "sharded")


def run(name, folder, *flags):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def number(pattern, text):
    """What the group of the only match says, without the commas."""
    (found,) = re.findall(pattern, text)
    return float(found.replace(",", ""))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def digits():
    return shapes(bias_0=(64,), kernel_0=(784, 64), bias_1=(10,), kernel_1=(64, 10))


def test_unreliable_workers(tmp_path):
    said = run("unreliable_workers", tmp_path, "--steps", "60")
    rows = re.findall(r"^(\d) +(\d+) +(\d+) +(\d+) steps$", said, re.MULTILINE)
    worker, images, votes, voted = zip(*(map(int, row) for row in rows), strict=True)
    assert worker == tuple(range(8))
    assert [size / vote for size, vote in zip(images, votes, strict=True)] == [8.0] * 8
    # Workers 0 and 1 come back, 6 and 7 drop out, 5 is broken in six steps.
    assert voted == (10, 35, 60, 60, 60, 54, 50, 25)
    leaves = re.findall(r"^\['(\w+)'\]\['(\w+)'\] +([\d.]+)% +([\d.]+)$", said, re.MULTILINE)
    assert len(leaves) == 4
    assert all(0 <= float(tied) < 100 and 0 < float(margin) <= 1 for *_, tied, margin in leaves)
    first, last = number(r"([\d.]+) in the first", said), number(r"([\d.]+) in the last", said)
    assert last < 0.7 * first
    assert number(r"held-out accuracy: ([\d.]+)%", said) > 70


def test_nodes(tmp_path):
    said = run("nodes", tmp_path, "--steps", "60")
    assert number(r"last 20 steps: loss ([\d.]+)", said) < number(r"first 20 .*loss ([\d.]+)", said)
    assert number(r"last 20 steps: .*accuracy ([\d.]+)%", said) > 70
    assert number(r"([\d,]+) by the vote", said) == 4 * dl.wire_cost(digits(), 2).bytes_received
    full = dl.full_precision_cost(digits(), 2).bytes_received
    assert number(r"([\d,]+) in full precision", said) == full
    assert number(r"held-out accuracy: ([\d.]+)%", said) > 70


@pytest.mark.parametrize("rule", ["average", "frozen"])
@pytest.mark.slow
def test_by_layer(tmp_path, rule):
    said = run("by_layer", tmp_path, "--steps", "60", "--embedding", rule)
    rows = re.findall(r"^\['(\w+)'\]\['(\w+)'\] +([\d,]+)  (\w+)$", said, re.MULTILINE)
    assert {kind: word for _, kind, _, word in rows} == RULES | {"embedding": rule}
    leaves = {(layer, kind): int(size.replace(",", "")) for layer, kind, size, _ in rows}
    params = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in leaves.items()}
    labels = {(layer, kind): word for layer, kind, _, word in rows}
    cost = dl.wire_cost_by_label(params, labels, 8, ballot="ternary", threshold=1e-5)
    assert number(r"in all +([\d,]+)", said) == cost.bytes_received
    messages = re.findall(r"^all-[a-z-]+ of [\d,]+ \w+ +([\d,]+)$", said, re.MULTILINE)
    assert [int(x.replace(",", "")) for x in messages] == [
        message.bytes_received for message in cost.collectives
    ]
    full = dl.full_precision_cost(params, 8).bytes_received
    assert number(r"in full precision +([\d,]+)", said) == full
    before, after = number(r"([\d.]+) before", said), number(r"([\d.]+) after", said)
    assert after < before - 1


def test_batch_norm(tmp_path):
    said = run("batch_norm", tmp_path, "--steps", "80")
    assert number(r"([\d.]+) in the last", said) < 0.5 * number(r"([\d.]+) in the first", said)
    learned = number(r"held-out accuracy: ([\d.]+)%", said)
    assert learned > 75
    assert number(r"as they began: ([\d.]+)%", said) < learned - 5


def test_resume(tmp_path):
    said = run("resume", tmp_path, "--steps", "20")
    assert "restored at step 20: the same bits in the end" in said
    rows = re.findall(r"steps (\d+) to (\d+): loss ([\d.]+), (\d+) workers voted", said)
    assert [(int(a), int(b), int(n)) for a, b, _, n in rows] == [
        (0, 20, 8), (20, 40, 8), (20, 40, 8), (20, 40, 4),
    ]  # fmt: skip
    assert rows[1][2] == rows[2][2]


def test_sharded(tmp_path):
    said = run("sharded", tmp_path, "--steps", "30")
    first, last = (number(rf"([\d.]+) in the {name}", said) for name in ("first", "last"))
    assert last < first - 1.5
    assert "all copies agree: True" in said
    layer = {"qkv": (64, 192), "out": (64, 64), "up": (64, 256), "down": (256, 64)}
    split = shapes(table=(64, 64), scale=(2, 128), **{k: (2, *s) for k, s in layer.items()})
    vote = number(r"the vote: ([\d,]+)", said)
    assert vote == dl.wire_cost(split, 2).bytes_received
    assert vote <= number(r"from the other replica: ([\d,]+)", said) <= vote + 100  # scalars
    size = number(r"([\d,]+) parameters", said)
    full = number(r"of full precision: ([\d,]+)", said)
    assert full == dl.full_precision_cost(split, 2).bytes_received
    for name in ("parameters", "momentum"):
        held = number(rf"{name}: ([\d,]+), unsplit", said)
        assert size <= held < 1.01 * size  # a quarter, at 4 bytes each; norms are not split
    gathered = sum(3 * 2 * a * b * 4 for a, b in layer.values())  # by each of four devices
    assert number(r"to orthogonalise: ([\d,]+)", said) == gathered


@pytest.mark.parametrize("name", SHORT)
def test_help_says_what_it_shows(tmp_path, name):
    said = run(name, tmp_path, "--help")
    assert "--steps" in said
    assert "Trains" in said
