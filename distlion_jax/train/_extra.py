# SPDX-License-Identifier: Apache-2.0
"""Extra arguments of a step: that each of them has the right shape, and reaches somebody.

In:  ``participating``, ``weight``, ``value`` and what a transformation takes besides.
Out: the same, an entry a worker; or an error, because what nobody reads is dropped in silence.
"""

import difflib
from typing import Any

import jax
import numpy as np

VOTES_TAKE = ("participating", "weight")
KNOWN = (*VOTES_TAKE, "value")


def by_worker(extra: dict[str, Any], n: int, local: int, votes: bool) -> dict[str, Any]:
    """The arguments with a leading worker axis; one number for all becomes an entry for each.

    Args:
      extra: as the step was given them.
      n: workers of all processes.
      local: entries that this process passes.
      votes: whether workers take part one by one; an average by the step itself is of all.
    """
    out = {}
    for name, value in extra.items():
        if name in VOTES_TAKE and not votes:
            raise ValueError(f"`{name}` is for a vote; gradients='mean' takes all.")
        shapes = {np.shape(x)[:1] for x in jax.tree.leaves(value)}
        if not shapes:  # None: as if it had not been given
            continue
        if shapes == {()} and name not in VOTES_TAKE:
            value = jax.tree.map(lambda x: np.broadcast_to(x, (local, *np.shape(x))), value)
        elif shapes != {(local,)}:
            whose = "one entry a worker" if n == local else "an entry for each of this process's"
            example = f"numpy.full({local}, {value!r})" if shapes == {()} else "numpy.ones(...)"
            found = next(s for s in map(np.shape, jax.tree.leaves(value)) if s[:1] != (local,))
            raise ValueError(
                f"`{name}` has shape {found}; a leading axis of {local}, {whose}, was expected, as "
                f"{example} has it."
            )
        out[name] = value
    return out


def check_read(tx: Any, name: str, grads: Any, state: Any, params: Any, extra: Any) -> None:
    """Raises for an argument, of no known name, that the transformation does not read.

    Transformations accept all extra arguments and ignore what they do not know. So the update is
    traced, and it is seen whether anything depends on the argument.
    """

    def update(value: Any) -> Any:
        return tx.update(grads, state, params, **{**extra, name: value})

    jaxpr = jax.make_jaxpr(update)(extra[name]).jaxpr
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    read |= set(map(id, jaxpr.outvars))  # a state may keep it as it is
    if read.isdisjoint(map(id, jaxpr.invars)):
        near = difflib.get_close_matches(name, set(KNOWN) - {name}, 1, 0.7)
        hint = f"Did you mean `{near[0]}`?" if near else f"Votes take {VOTES_TAKE}."
        raise TypeError(f"`{name}` is an argument that nothing in `tx` reads. {hint}")


def check_heard(heard: list[set[str]], extra: dict[str, Any]) -> None:
    """Raises where an exchange did not receive what the step was given for it."""
    for name in VOTES_TAKE:
        if name in extra and any(name not in names for names in heard):
            raise ValueError(
                f"`{name}` did not reach every vote or average in `tx`: a transformation around "
                "one drops extra arguments (as optax.MultiSteps(...).gradient_transformation() "
                "does inside optax.chain). Use distlion_jax.accumulate_gradients, or an "
                "optax.GradientTransformationExtraArgs that hands them on."
            )
