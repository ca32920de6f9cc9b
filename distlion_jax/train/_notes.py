# SPDX-License-Identifier: Apache-2.0
"""What JAX's own errors mean in a step of ours: a sentence that leads on, added to them.

Warnings too: they point at the line of the user's that called the step.
"""

import contextlib
import pathlib
import sys
import warnings
from collections.abc import Iterator

import jax
from jax import lax

_INSIDE = (  # frames that are not the user's
    str(pathlib.Path(__file__).parents[1]),
    str(pathlib.Path(jax.__file__).parent),
    contextlib.__file__,
)

_MARK = "jax.lax.pcast(x, axis_name, to='varying')" if hasattr(lax, "pcast") else "jax.lax.pvary"

_LOOP = (
    "distlion_jax: under JAX's check, what a loop begins with (zeros, say) is the same on all "
    "workers, and what it becomes is each worker's own. If the model is a library's, pass "
    "check_vma=False to make_train_step: the step then compares the replicas' bits instead. In a "
    f"model of your own, mark the first carry with {_MARK}, or derive it from the batch."
)
NOTES = {
    "out_specs": (
        "distlion_jax: if `tx` makes the workers agree, what follows that must be known to be the "
        "same on all of them. Wrap a transformation that keeps arrays in "
        "distlion_jax.replicated(...); let the state class of a counter declare "
        "roles = distlion_jax.Roles(shared=(...,)); freeze leaves with distributed_lion_by_label; "
        "or pass check_vma=False, with which the step compares the replicas' bits instead."
    ),
    "missing 1 required positional argument": (
        "distlion_jax: a loss function that takes a random key gets it from step(..., rng=key)."
    ),
    "carry input and carry output": _LOOP,
    "body_fun output and input": _LOOP,
    "branches must have equal output types": (
        "distlion_jax: under JAX's check, a branch that returns something of the worker's own and "
        "one that returns something of all workers differ in type. In `tx`, wrap what follows the "
        "vote in distlion_jax.replicated(...). In the model, mark the latter with "
        f"{_MARK}. Or pass check_vma=False, with which the step compares the replicas' bits."
    ),
}


def warn(message: str) -> None:
    """A warning at the nearest line that is not of this package or of JAX."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextlib.contextmanager
def leading_on() -> Iterator[None]:
    """Adds a sentence to JAX's errors about replication."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        notes = [note for sign, note in NOTES.items() if sign in text]
        if not notes or "distlion_jax" in text or type(error) not in (TypeError, ValueError):
            raise
        raise type(error)("\n\n".join([text, *notes])) from error
