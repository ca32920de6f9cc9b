# SPDX-License-Identifier: Apache-2.0
"""Where public names used to be: ``from distlion_jax.mesh import init_state`` still works.

An old module is another name of the one that holds its public names now. New code imports them from
``distlion_jax``.
"""

import importlib
import sys

MOVED = {
    "audit": "train",
    "dense": "average",
    "mesh": "train",
    "metrics": "train",
    "rendezvous": "cluster",
    "health": "_vote.verdict",
    "rules": "_rules",
}


def install() -> None:
    """Registers the old modules; called once, when the package is imported."""
    package = sys.modules["distlion_jax"]
    for old, new in MOVED.items():
        module = importlib.import_module(f"distlion_jax.{new}")
        sys.modules[f"distlion_jax.{old}"] = module
        setattr(package, old, module)
