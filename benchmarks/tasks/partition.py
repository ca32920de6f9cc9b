# SPDX-License-Identifier: Apache-2.0
"""Who holds which training rows: workers whose data differ in their mix of labels.

In:  the label of every row, a number of workers, alpha. Out: row numbers for every worker.
Each worker draws a mix of labels from a Dirichlet distribution and fills an equal share of the rows
with it, as in Hsu et al., `Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification <https://arxiv.org/abs/1909.06335>`_, 2019. Here alpha is each label's, as in
the code of FedDyn and of what follows it; theirs is the sum over labels, 10 times this one for 10
labels. At alpha 100 all mixes are alike, at 0.05 most workers hold one or two labels.
"""

import math
from pathlib import Path

import numpy as np


def dirichlet(labels: np.ndarray, workers: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Splits rows over workers with label mixes from a Dirichlet distribution.

    Its parameter of a label is ``alpha``, times the label's share of the rows over its even share.

    Args:
      labels: int, of every row.
      workers: how many; each gets ``len(labels) // workers`` rows, none twice.
      alpha: concentration a label, above 0; smaller is more skewed. ``inf``: all are the data's.
      seed: of mixes and rows.

    Returns:
      Row numbers of each worker, in increasing order.
    """
    if not alpha > 0:
        raise ValueError(f"`alpha` must be above 0 (inf: all alike); got {alpha}.")
    if not 1 <= workers <= len(labels):
        raise ValueError(f"`workers` must lie in [1, {len(labels)}] (the rows); got {workers}.")
    rng = np.random.default_rng(seed)
    names, counts = np.unique(labels, return_counts=True)
    share = counts / len(labels)
    left = [rng.permutation(np.flatnonzero(labels == name)) for name in names]
    quota = len(labels) // workers
    out = []
    for _ in range(workers):
        mix = share if math.isinf(alpha) else _mix(rng, alpha * len(names) * share)
        taken: list[np.ndarray] = []
        need = quota
        while need:
            stock = np.array([len(rows) for rows in left])
            chances = np.where(stock > 0, mix, 0)
            if chances.sum() <= 0:  # its labels have run out: another one, of what there is
                chances = np.eye(len(names))[rng.choice(len(names), p=stock / stock.sum())]
            wanted = np.minimum(rng.multinomial(need, chances / chances.sum()), stock)
            for k, many in enumerate(wanted):
                taken.append(left[k][:many])
                left[k] = left[k][many:]
            need -= int(wanted.sum())
        out.append(np.sort(np.concatenate(taken)))
    return out


def _mix(rng: np.random.Generator, alphas: np.ndarray) -> np.ndarray:
    """A Dirichlet sample; where all gammas are too small for a float, one label takes all."""
    sample = rng.standard_gamma(alphas)
    if sample.sum() > 0:
        return sample / sample.sum()
    return np.eye(len(alphas))[rng.choice(len(alphas), p=alphas / alphas.sum())]


def by_group(groups: np.ndarray, workers: int) -> list[np.ndarray]:
    """Whole groups (works of an author) to workers, the largest first to who has least."""
    names, counts = np.unique(groups, return_counts=True)
    if workers > len(names):
        raise ValueError(f"`workers` must be at most {len(names)} (the groups); got {workers}.")
    held: list[list[int]] = [[] for _ in range(workers)]
    rows = np.zeros(workers, np.int64)
    for k in np.argsort(-counts, kind="stable"):
        poorest = int(rows.argmin())
        held[poorest].append(int(names[k]))
        rows[poorest] += counts[k]
    return [np.flatnonzero(np.isin(groups, mine)) for mine in held]


def skew(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean total-variation distance of the workers' label mixes from the data's: 0 to 1."""
    names = np.unique(labels)
    whole = np.array([(labels == name).mean() for name in names])
    mixes = [np.array([(labels[rows] == name).mean() for name in names]) for rows in parts]
    return float(np.mean([np.abs(mix - whole).sum() / 2 for mix in mixes]))


def picture(labels: np.ndarray, splits: dict[str, list[np.ndarray]], file: Path) -> None:
    """Who holds what: a panel a split, a bar a worker, a colour a label."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = np.unique(labels)
    figure, panels = plt.subplots(
        1, len(splits), figsize=(3 * len(splits) + 1, 3), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    if len(names) > 10:
        colours = mpl.colormaps["turbo"](np.linspace(0, 1, len(names)))
    for axes, (title, parts) in zip(panels[0], splits.items(), strict=True):
        bottom = np.zeros(len(parts))
        for k, name in enumerate(names):
            share = np.array([(labels[rows] == name).mean() for rows in parts])
            axes.bar(range(len(parts)), share, bottom=bottom, color=colours[k], width=0.9)
            bottom += share
        axes.set_title(f"{title}\n{skew(labels, parts):.2f} from the whole's mix", fontsize=9)
        axes.set_xlabel("worker")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("share of its rows, by label")
    figure.savefig(file, dpi=130)
    plt.close(figure)
