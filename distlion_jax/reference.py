# SPDX-License-Identifier: Apache-2.0
"""Distributed Lion, stated once more in plain NumPy loops.

This is the yardstick of the package, not a fast path.  It simulates ``n`` workers in one process,
coordinate by coordinate, with Python integers for everything that is counted or hashed and NumPy
for everything that is rounded.  It shares no code with the rest of the package, on purpose: the
tests run both on the same inputs and compare the results with ``==``.

The algorithm is Distributed Lion (Liu et al., NeurIPS 2024, arXiv 2404.00438).  Every worker
blends its own momentum with its own gradient, votes with the signs of that blend, and all workers
apply the verdict of the vote to identical parameters.  With ``hidden`` leaves, the blend of such a
matrix is first orthogonalised by Newton and Schulz, in float64 here.  A tree is a list of arrays
("leaves") of any shape; scalars and empty leaves are allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Tree = Sequence[Array]
Address = tuple[Array, Array, Array]  # word index, bit and block id of every coordinate of a leaf

BLOCK = 128  # coordinates in a block
PLANES = 32  # blocks in a group, one for each bit of a word
GROUP = BLOCK * PLANES
MASK = 0xFFFFFFFF


@dataclass
class State:
    """What the workers remember: ``count`` rounds so far, and ``mu[worker][leaf]``."""

    count: int
    mu: list[list[Array]]


@dataclass
class Round:
    """The verdict of one round and its health, over the whole tree and leaf by leaf."""

    direction: list[Array]
    voters: int
    voted: list[bool]
    tied: float
    margin: float
    leaf_tied: list[float]
    leaf_margin: list[float]


def mix(x: int) -> int:
    """Hash 32 bits to 32 bits; ``mix(0) == 0``."""
    x &= MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def coin_word(step: int, worker: int, word: int) -> int:
    """Return the 32 coins of a worker for the coordinates of one word in one round."""
    return mix(word ^ mix(step ^ mix(worker + 1)))


def tie_word(step: int, word: int) -> int:
    """Return the 32 coins that break the ties of one word in one round, for all workers alike."""
    return mix(word ^ mix(step ^ mix(0)))


def addresses(leaves: Tree) -> list[Address]:
    """Return ``(word index, bit, block id)`` of every coordinate, one triple of arrays per leaf.

    The whole groups of each leaf (its body) come first, in leaf order.  What is left of each leaf
    (its tail) is padded to whole blocks; the tail blocks of all leaves share the groups that
    follow.  A block lies in one bit plane of one group and its id is ``group * 32 + plane``.
    """
    body_groups = sum(leaf.size // GROUP for leaf in leaves)
    tail_blocks = [-(-(leaf.size % GROUP) // BLOCK) for leaf in leaves]  # rounded up
    tail_groups = -(-sum(tail_blocks) // PLANES)  # rounded up

    result: list[Address] = []
    first_group = 0  # of the body of this leaf
    first_block = 0  # of the tail of this leaf, in the list of all tail blocks
    for j, leaf in enumerate(leaves):
        groups = leaf.size // GROUP
        body = groups * GROUP
        word, bit, block = (np.zeros(leaf.size, np.int64) for _ in range(3))
        for f in range(leaf.size):
            if f < body:
                plane, rest = divmod(f, groups * BLOCK)
                group = first_group + rest // BLOCK
                column = rest % BLOCK
            else:
                t = first_block + (f - body) // BLOCK
                plane = t // tail_groups
                group = body_groups + t % tail_groups
                column = (f - body) % BLOCK
            word[f] = group * BLOCK + column
            bit[f] = plane
            block[f] = group * PLANES + plane
        shape = leaf.shape
        result.append((word.reshape(shape), bit.reshape(shape), block.reshape(shape)))
        first_group += groups
        first_block += tail_blocks[j]
    return result


def _average(gradient: Array, momentum: Array, decay: float) -> Array:
    """Return ``(1 - decay) * gradient + decay * momentum`` in the dtype of the gradient."""
    real = gradient.dtype.type
    with np.errstate(all="ignore"):  # an overflow is an infinity, and the worker sits out
        return np.asarray(real(1 - decay) * gradient + real(decay) * momentum.astype(real))


def _averages(gradients: Sequence[Tree], mu: Sequence[Tree], decay: float) -> list[list[Array]]:
    """Return the average of every worker's leaves."""
    pairs = [zip(g, m, strict=True) for g, m in zip(gradients, mu, strict=True)]
    return [[_average(g, m, decay) for g, m in mine] for mine in pairs]


def newton_schulz(matrix: Array, steps: int = 5) -> Array:
    """Return ``U S' V^T`` of ``matrix = U S V^T``, with S' near 1; zeros of zeros.

    Singular value by singular value the iteration is ``s <- a s + b s^3 + c s^5``, from
    ``s / |matrix|_F``.  So it is written here: by an SVD, and without a matrix product.
    """
    with np.errstate(all="ignore"):
        if not np.all(np.isfinite(matrix)):
            return np.full(matrix.shape, np.nan)
        u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    norm = np.sqrt(np.sum(s * s))
    if norm == 0:
        return np.zeros(matrix.shape)
    s = s / norm
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    result = (u * s) @ vt
    result[~np.any(matrix, axis=1), :] = 0  # rows and columns of zeros stay so; an SVD rounds
    result[:, ~np.any(matrix, axis=0)] = 0
    return np.asarray(result)


def _noise(
    blends: Sequence[Tree], entered: Sequence[bool], amount: float, step: int
) -> list[list[Array]]:
    """Return the numbers that each worker adds to its blends before it votes.

    Uniform in plus or minus ``amount`` root mean squares of a leaf, of all workers that entered.
    """
    if not amount:
        return [[np.zeros_like(c) for c in mine] for mine in blends]
    n, leaves = len(blends), blends[0]
    result: list[list[Array]] = [[] for _ in range(n)]
    first = 0  # coordinate of the tree
    for j, leaf in enumerate(leaves):
        squares = [np.sum(blends[i][j].astype(np.float32) ** 2) for i in range(n) if entered[i]]
        rms = np.sqrt(
            np.float32(sum(squares)) / np.float32(max(len(squares), 1) * max(leaf.size, 1))
        )
        for i in range(n):
            stream = mix((i + 1) | 0x80000000)
            bits = [mix((first + f) ^ mix(step ^ stream)) >> 8 for f in range(leaf.size)]
            uniform = np.asarray(bits, np.float32).reshape(leaf.shape) * np.float32(2.0**-24)
            result[i].append((2 * uniform - 1) * (np.float32(amount) * rms))
        first += leaf.size
    return result


def _votes(
    blend: Array,
    noise: Array,
    address: Address,
    step: int,
    worker: int,
    threshold: float,
    abstain: bool,
) -> list[int]:
    """Return the votes (+1, 0 or -1) of one worker on one leaf, in C order.

    A coordinate without an opinion abstains if ``abstain``.  Otherwise it votes by its coin, but
    only where some other coordinate of its block has an opinion.
    """
    values, added = blend.reshape(-1), noise.reshape(-1)
    word, bit, block = (part.reshape(-1) for part in address)
    opinion = np.abs(values) > values.dtype.type(threshold)
    opinionated_blocks = {int(block[f]) for f in range(values.size) if opinion[f]}

    votes = []
    for f in range(values.size):
        if opinion[f]:
            votes.append(1 if values[f] + added[f] > 0 else -1)
        elif abstain or int(block[f]) not in opinionated_blocks:
            votes.append(0)
        else:
            coin = (coin_word(step, worker, int(word[f])) >> int(bit[f])) & 1
            votes.append(1 if coin else -1)
    return votes


def init(params: Tree, n: int, mu_dtype: DTypeLike | None = None) -> State:
    """Return the state of ``n`` workers before the first round: every momentum is zero."""
    dtypes = [x.dtype if mu_dtype is None else mu_dtype for x in params]
    pairs = list(zip(params, dtypes, strict=True))
    return State(0, [[np.zeros(x.shape, dtype) for x, dtype in pairs] for _ in range(n)])


def _judge(
    leaf: Array,
    address: Address,
    ballots: Sequence[Sequence[int]],
    weights: Sequence[int],
    step: int,
    aggregation: str,
    ties: str,
    voted: Sequence[bool],
) -> tuple[Array, int, int]:
    """All workers together, one leaf: its direction, how many tied, and the sum of ``|total|``."""
    flat = np.zeros(leaf.size, leaf.dtype)
    everyone = sum(w for w, entered in zip(weights, voted, strict=True) if entered)
    word, bit, _ = (part.reshape(-1) for part in address)
    tied, lead = 0, 0
    for f in range(leaf.size):
        total = sum(w * b[f] for w, b in zip(weights, ballots, strict=True))
        present = sum(w * abs(b[f]) for w, b in zip(weights, ballots, strict=True))
        tied += total == 0 and present > 0
        lead += abs(total)
        if aggregation == "average":
            flat[f] = np.float32(total) / np.float32(everyone) if everyone else 0
        elif total != 0:
            flat[f] = 1 if total > 0 else -1
        elif ties == "coin" and present > 0:
            flat[f] = 1 if (tie_word(step, int(word[f])) >> int(bit[f])) & 1 else -1
    return flat.reshape(leaf.shape), tied, lead


def _report(judged: Sequence[tuple[Array, int, int]], voted: list[bool], everyone: int) -> Round:
    """The round of all leaves; health is quotients of two exact integers, each rounded once."""
    sizes = [d.size for d, _, _ in judged]
    size, full = max(sum(sizes), 1), max(everyone, 1)
    return Round(
        direction=[d for d, _, _ in judged],
        voters=sum(voted),
        voted=voted,
        tied=sum(t for _, t, _ in judged) / size,
        margin=sum(lead for _, _, lead in judged) / (full * size),
        leaf_tied=[t / max(d.size, 1) for d, t, _ in judged],
        leaf_margin=[lead / (full * max(d.size, 1)) for d, _, lead in judged],
    )


def vote(
    state: State,
    gradients: Sequence[Tree],
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    aggregation: str = "majority",
    ties: str = "zero",
    ballot: str = "binary",
    threshold: float = 0.0,
    participating: Sequence[bool] | None = None,
    weight: Sequence[int] | None = None,
    max_weight: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    hidden: Sequence[int] = (),
    ns_steps: int = 5,
    period: int = 1,
) -> tuple[Round, State]:
    """Hold one round on ``gradients[worker][leaf]``; return it, and the state after it.

    A worker enters if it participates, its blends are all finite and its weight is in
    ``1..max_weight``; otherwise it casts no vote and its momentum stays as it was.  The threshold
    belongs to the ternary ballot; the binary one always asks whether the blend is nonzero.
    ``noise`` is added to blends that have an opinion.  ``seed`` is that of coins and noise.
    ``hidden`` names the leaves, matrices, whose blends are orthogonalised in every ``period``-th
    round, the first included.
    """
    known = aggregation in ("majority", "average") and ties in ("zero", "coin")
    if not known or ballot not in ("ternary", "binary"):
        raise ValueError(f"unknown rule among {aggregation!r}, {ties!r}, {ballot!r}")
    n, leaves, address = len(gradients), gradients[0], addresses(gradients[0])
    step = state.count ^ mix(seed)  # mix(0) is 0
    participating = [True] * n if participating is None else participating
    weights = [1] * n if weight is None else [int(w) for w in weight]
    abstain = ballot == "ternary" or n == 1
    least = threshold if ballot == "ternary" else 0.0
    # Each worker alone: does it enter?
    blends, new = (_averages(gradients, state.mu, decay) for decay in (b1, b2))
    fine = [all(bool(np.all(np.isfinite(c))) for c in mine) for mine in blends]
    voted = [bool(participating[i]) and fine[i] and 1 <= weights[i] <= max_weight for i in range(n)]
    if state.count % period == 0:
        for mine in blends:
            mine[:] = [newton_schulz(c, ns_steps) if j in hidden else c for j, c in enumerate(mine)]
    # And how does it vote, what does it remember?
    added = _noise(blends, voted, noise, step)
    ballots: list[list[list[int]]] = []  # [worker][leaf][coordinate]
    mu: list[list[Array]] = []
    for i in range(n):
        placed, rule = zip(blends[i], added[i], address, strict=True), (step, i, least, abstain)
        ballots.append([_votes(*p, *rule) if voted[i] else [0] * p[0].size for p in placed])
        pairs = zip(new[i], state.mu[i], strict=True)
        mu.append([x.astype(m.dtype) if voted[i] else m.copy() for x, m in pairs])

    judged = [
        _judge(leaf, address[j], [b[j] for b in ballots], weights, step, aggregation, ties, voted)
        for j, leaf in enumerate(leaves)
    ]
    everyone = sum(w for w, entered in zip(weights, voted, strict=True) if entered)
    return _report(judged, voted, everyone), State(state.count + 1, mu)


def apply(
    params: Tree, direction: Tree, learning_rate: float, weight_decay: float = 0.0
) -> list[Array]:
    """Return ``x - learning_rate * (direction + weight_decay * x)`` for every leaf ``x``."""
    result = []
    for x, d in zip(params, direction, strict=True):
        real = x.dtype.type
        step = d.astype(real) + real(weight_decay) * x
        result.append(np.asarray(x - real(learning_rate) * step))
    return result
