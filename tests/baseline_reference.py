# SPDX-License-Identifier: Apache-2.0
"""The baselines once more, in plain NumPy loops over workers and leaves; never optimised.

Each ``*_message`` gives what a worker's leaf stands for after compression. Random numbers are the
reference's hash; ballots are the reference's.
"""

import math

import numpy as np

from distlion_jax import reference


def uniforms(step, worker, first, size):
    """Random numbers in [0, 1) of (step, coordinate, worker)."""
    seed = reference.mix(step ^ reference.mix(worker + 1))
    bits = [reference.mix(i ^ seed) >> 8 for i in range(first, first + size)]
    return np.asarray(bits, np.float32) * np.float32(2.0**-24)


def firsts(leaves):
    """Index of the first coordinate of every leaf."""
    return np.cumsum([0, *(x.size for x in leaves)])[:-1].tolist()


def qsgd(leaves, step, worker, levels, bucket, norm):
    out = []
    for x, first in zip(leaves, firsts(leaves), strict=True):
        flat, u = x.reshape(-1), uniforms(step, worker, first, x.size)
        value = np.zeros_like(flat)
        for a in range(0, x.size, bucket):
            part = flat[a : a + bucket]
            size = np.abs(part).max() if norm == "max" else np.sqrt((part * part).sum())
            for j in range(len(part)):
                share = np.abs(part[j]) / size if size > 0 else np.float32(0)
                level = min(math.floor(share * np.float32(levels) + u[a + j]), levels)
                value[a + j] = level * np.sign(part[j]) * (size / np.float32(levels))
        out.append(value.reshape(x.shape))
    return out


def ef_sign(leaves, step, worker):
    out = []
    for x, address in zip(leaves, reference.addresses(leaves), strict=True):
        votes = np.asarray(
            reference._votes(x, 0 * x, address, step, worker, 0.0, False), np.float32
        )
        scale = np.abs(x).sum() / max(np.count_nonzero(votes), 1)
        out.append((votes * np.float32(scale)).reshape(x.shape).astype(np.float32))
    return out


def top_k(leaves, density):
    out = []
    for x in leaves:
        flat, value = x.reshape(-1), np.zeros(x.size, np.float32)
        at = np.argsort(-np.abs(flat), kind="stable")[: math.ceil(density * x.size)]
        value[at] = flat[at]
        out.append(value.reshape(x.shape))
    return out


def mean(parts, entered):
    """Mean over the workers that entered, of lists of leaves."""
    chosen = [p for p, e in zip(parts, entered, strict=True) if e]
    if not chosen:
        return [np.full_like(x, np.nan) for x in parts[0]]
    return [sum(xs) / np.float32(len(chosen)) for xs in zip(*chosen, strict=True)]


def terngrad(workers, step, clip, entered):
    """All workers together: they share their scales."""
    most = lambda x: np.float32(clip or np.inf) * np.sqrt((x * x).mean())  # noqa: E731
    clipped = [[np.clip(x, -most(x), most(x)) for x in leaves] for leaves in workers]
    chosen = [c for c, e in zip(clipped, entered, strict=True) if e]
    scales = [max(np.abs(x).max(initial=0) for x in xs) for xs in zip(*chosen, strict=True)]
    parts = []
    for i, leaves in enumerate(clipped):
        part = []
        for x, scale, first in zip(leaves, scales, firsts(leaves), strict=True):
            u = uniforms(step, i, first, x.size).reshape(x.shape)
            part.append(np.where(np.abs(x) > u * np.float32(scale), np.sign(x) * scale, 0))
        parts.append(part)
    return mean(parts, entered)


def power_sgd(workers, qs, entered):
    """All workers together: the mean, their parts of it, the new Q (None where none is split)."""
    out, parts, new = [], [[] for _ in workers], []
    for xs, q in zip(zip(*workers, strict=True), qs, strict=True):
        chosen = [x for x, e in zip(xs, entered, strict=True) if e]
        average = sum(chosen) / np.float32(len(chosen))
        if q is None:
            out.append(average)
            new.append(None)
            for part, x in zip(parts, xs, strict=True):
                part.append(x)
            continue
        m = average.reshape(-1, average.shape[-1])  # the mean of the products is that of the means
        p = np.linalg.qr(m @ q)[0]
        new.append(m.T @ p)
        out.append((p @ new[-1].T).reshape(average.shape))
        for part, x in zip(parts, xs, strict=True):
            part.append((p @ (p.T @ x.reshape(m.shape))).reshape(x.shape))
    return out, parts, new
