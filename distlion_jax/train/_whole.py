# SPDX-License-Identifier: Apache-2.0
"""Whether the state that a step was given is whole, and of its transformation.

In:  a state as it lies outside the mapped function, with a leading worker axis. Out: nothing, or an
     error that names what was lost, and the way out.

Per-worker state is lost by habits from replicated training: one worker's copy for all
(``unreplicate``), a save of what one host holds, a restore onto fewer or more workers. The stamps
of the exchanges (:mod:`distlion_jax._vote.stamp`) show it.
"""

import itertools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from distlion_jax._vote.wire import is_key
from distlion_jax.exchanges import declares, exchanges, is_once, roles_of
from distlion_jax.train._notes import warn

CURE = (
    "Save and restore the whole state, its leading worker axis included. For another number of "
    "workers: distlion_jax.resize_state(state, mesh). To begin without momenta: init_state."
)


def stamps_of(state: Any) -> list[Any]:
    """The stamps of all exchanges that have one, in order: ``int32[n, 2]`` each."""
    found = [getattr(node, "stamp", None) for node in exchanges(state)]
    return [stamp for stamp in found if stamp is not None]


def _expected(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Stamps of whole states: by worker of any of the axes, in any order; rows as in the mesh."""
    grid = np.indices(sizes).reshape(len(sizes), -1)
    out = []
    for count in range(1, len(sizes) + 1):
        for axes in itertools.permutations(range(len(sizes)), count):
            shape = [sizes[i] for i in axes]
            index = np.ravel_multi_index([grid[i] for i in axes], shape)
            out.append(np.stack([index, np.full_like(index, np.prod(shape))], axis=1))
    return out


def _rows(stamp: Any) -> np.ndarray | None:
    """The rows that this process holds, with those of others as -1; None for other shapes."""
    if np.ndim(stamp) != 2 or np.shape(stamp)[1] != 2:
        return None
    if getattr(stamp, "is_fully_addressable", True):
        return np.asarray(stamp)
    rows = np.full(stamp.shape, -1)
    for shard in stamp.addressable_shards:
        rows[shard.index] = np.asarray(shard.data)
    return rows


def check_whole(state: Any, sizes: tuple[int, ...], passed: tuple[int, ...] | None = None) -> None:
    """Raises unless every worker holds the state that was its own.

    Args:
      state: with a leading worker axis.
      sizes: of the axes that the workers lie on.
      passed: the workers whose rows these are; None: all, or those on this process's devices.

    Rows of NumPy arrays that were made for another number of workers were taken by hand. They are
    let through with a warning.
    """
    n = int(np.prod(sizes))
    for stamp in stamps_of(state):
        rows = _rows(stamp)
        if rows is None or len(rows) != (n if passed is None else len(passed)):
            continue  # other checks say so
        if passed is not None:
            whole = np.full((n, 2), -1)
            whole[list(passed)] = rows
            rows = whole
        mine = rows[:, 1] >= 0
        used = rows[mine, 1] > 0
        if not used.any() or any((rows[mine] == x[mine]).all() for x in _expected(sizes)):
            continue
        kept = len({tuple(row) for row in rows[mine][used]})
        before = sorted(set(rows[mine][used, 1].tolist()))
        if not used.all():
            what = f"{int(used.sum())} of {n} workers hold a momentum, the others begin at 0"
        elif before == [n] and kept < n:
            what = f"its {n} rows are the momenta of {kept} of the {n} workers"
        elif before == [n]:
            what = "its rows are in another order than the workers"
        else:
            made = " and ".join(map(str, before))
            what = f"{made} workers made it, and the momenta of {kept} are left, for {n} workers"
        complaint = f"`state` was torn: {what}. {CURE}"
        by_hand = isinstance(stamp, np.ndarray) and used.all() and len(before) == 1
        if by_hand and before != [n] and kept == min(n, before[0]):
            warn(complaint)
        else:
            raise ValueError(complaint)


def check_fits(state: Any, expected: Any) -> None:
    """Raises unless the state has the structure of the transformation's own.

    Args:
      state: what a step was given.
      expected: shapes of what ``tx.init`` makes.
    """
    if jax.tree.structure(state) == jax.tree.structure(expected):
        for mine, other in zip(exchanges(state), exchanges(expected), strict=True):
            for name in type(other).roles.like_params:
                _check_dtypes(name, getattr(mine, name), getattr(other, name))
        return
    have, want = (
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (state, expected)
    )
    missing = [path for path in want if path not in set(have)]
    excess = [path for path in have if path not in set(want)]
    if not missing and not excess:
        raise ValueError(
            "`state` has the leaves of the transformation's state in other containers (a list for "
            "a tuple, say), as a checkpoint that was restored without a target. Restore it onto a "
            "fresh one, as Orbax's restore(path, init_state(...)) does, so that names are matched."
        )
    lacks = f"it lacks {missing[0]}" if missing else f"it has {excess[0]} besides"
    raise ValueError(
        f"`state` is not of this `tx`: {lacks} ({len(missing)} leaves are missing, {len(excess)} "
        "are in excess). Options, labels or the chain have changed since it was made, or its "
        "containers are others (a dict for a NamedTuple, as of a checkpoint that was restored "
        "without a target). Begin a state anew with init_state, or restore onto one."
    )


def _check_dtypes(name: str, mine: Any, other: Any) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(other), strict=True)
    for (path, x), y in pairs:
        if x.dtype != y.dtype:
            raise ValueError(
                f"the state's `{name}{jax.tree_util.keystr(path)}` is {x.dtype}, and `tx` makes "
                f"{y.dtype}: mu_dtype, or the parameters' dtype, has changed. Cast it, or build "
                "`tx` as the state was."
            )


def is_injected(node: Any) -> bool:
    """Whether a node of a state is that of ``optax.inject_hyperparams``."""
    return isinstance(node, optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState)


def with_rates(state: Any, n: int) -> Any:
    """The state with injected hyperparameters for every worker, where one was set by hand."""

    def spread(x: Any) -> Any:
        if np.ndim(x):
            return x
        return jnp.broadcast_to(x, (n,)) if isinstance(x, Tracer) else np.full((n,), x)

    def one(node: Any) -> Any:
        if not is_injected(node):
            return node
        rates = jax.tree.map(spread, node.hyperparams)
        return node._replace(hyperparams=rates, inner_state=with_rates(node.inner_state, n))

    return jax.tree.map(one, state, is_leaf=lambda node: is_injected(node) or is_once(node))


def with_health(state: Any, expected: Any) -> Any:
    """The state with health figures of the transformation's own form.

    They are reported, and read by nobody: a run may go on with another ``health``.

    Args:
      state: what a step was given, with a leading worker axis.
      expected: shapes of what ``tx.init`` makes, with that axis.
    """
    have, want = exchanges(state), exchanges(expected)
    if [type(x) for x in have] != [type(x) for x in want]:
        return state
    fresh = iter(want)
    forms = [jax.tree.structure(getattr(x, "health", None)) for x in (*have, *want)]
    if forms[: len(have)] == forms[len(have) :]:
        return state
    known = {id(x) for x in have}

    def one(node: Any) -> Any:
        if id(node) not in known:
            return node
        health = getattr(next(fresh), "health", None)
        if jax.tree.structure(health) == jax.tree.structure(getattr(node, "health", None)):
            return node
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), health)
        return node._replace(health=zeros)

    return jax.tree.map(one, state, is_leaf=lambda node: id(node) in known)


def shared_values(state: Any) -> dict[str, str]:
    """Hashes of what a stacked state shares, by its name; and whether its rounds were held."""
    found: dict[str, str] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=declares):
        roles = roles_of(node)
        if roles is None or roles.once:
            continue
        for name in roles.shared:
            for inner, x in jax.tree_util.tree_leaves_with_path(getattr(node, name)):
                where = f"`state{jax.tree_util.keystr(path)}.{name}{jax.tree_util.keystr(inner)}`"
                found[where] = _summary(_first_row(x))
        for name in set(getattr(node, "_fields", ())) - {*roles.own, *roles.shared}:
            nested = shared_values(getattr(node, name))
            found |= {k.replace("`state", f"`state{jax.tree_util.keystr(path)}.{name}"): v
                      for k, v in nested.items()}  # fmt: skip
        if getattr(node, "stamp", None) is not None:
            used = bool(_first_row(node.stamp)[1:].any())
            found[f"`state{jax.tree_util.keystr(path)}.stamp`"] = "used" if used else "fresh"
    return found


def _first_row(x: Any) -> np.ndarray:
    """The first of the rows that this process holds."""
    x = x.addressable_shards[0].data if hasattr(x, "addressable_shards") else x
    return np.asarray(jax.random.key_data(x) if is_key(x) else x)[0]


def _summary(x: np.ndarray) -> str:
    return str(x.item()) if x.ndim == 0 else f"{zlib.crc32(x.tobytes()):08x}"
