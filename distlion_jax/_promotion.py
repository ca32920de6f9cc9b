# SPDX-License-Identifier: Apache-2.0
"""The package's own arithmetic follows JAX's default promotion, whatever the user's code follows.

``jax_numpy_dtype_promotion="strict"`` and ``jax_numpy_rank_promotion="raise"`` find mistakes in a
code base. They are not meant for the inside of a library.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def default_promotion(f: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, traced under JAX's default promotion of dtypes and ranks."""

    @functools.wraps(f)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args, **kwargs)

    return run
