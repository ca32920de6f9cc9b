# SPDX-License-Identifier: Apache-2.0
"""The static rules of a vote, checked once, where they are chosen.

Everything that decides shapes, bytes or semantics is here and is a Python value; what may be
traced (``b1``, ``b2``, ``threshold``, ``learning_rate``) is not. Errors name the argument, the
value, what is allowed and the way out.
"""

import dataclasses
import operator
from typing import Any, Literal, get_args

import numpy as np
from jax.core import Tracer

Aggregation = Literal["majority", "average"]
Transport = Literal["auto", "all_gather", "two_phase", "psum"]
Ties = Literal["zero", "coin"]
Ballot = Literal["binary", "ternary"]
Health = Literal["off", "total", "leaf"]
AxisName = str | tuple[str, ...]

AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
TRANSPORTS: tuple[str, ...] = get_args(Transport)
TIES: tuple[str, ...] = get_args(Ties)
BALLOTS: tuple[str, ...] = get_args(Ballot)
HEALTH: tuple[str, ...] = get_args(Health)

MAX_WEIGHT = 2**16 - 1
MAX_CHUNKS = 64


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of the allowed names."""
    if value not in allowed:
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"`{name}` must be one of {names}; got {value!r}.")


def known(value: Any) -> np.ndarray | None:
    """The value of a number that is known now, as a traced one's is not."""
    return None if isinstance(value, Tracer) else np.asarray(value)


def check_fraction(name: str, value: Any) -> None:
    """Raises unless a number lies in [0, 1); a traced one is let through."""
    number = known(value)
    if number is not None and not (number.ndim == 0 and 0.0 <= number < 1.0):
        raise ValueError(f"`{name}` must lie in [0, 1); got {value!r}.")


def check_from_zero(name: str, value: Any) -> None:
    """Raises unless a number is finite and at least 0; None and a traced one are let through."""
    number = None if value is None else known(value)
    if number is not None and not (number.ndim == 0 and 0 <= number < float("inf")):
        raise ValueError(f"`{name}` must be a finite number of at least 0; got {value!r}.")


def check_static(name: str, value: Any, allowed: str, top: int) -> None:
    """Raises unless ``value`` is a Python integer in [1, top]; it decides shapes."""
    try:
        number = operator.index(value)
    except Exception:  # a tracer raises its own error here
        raise ValueError(
            f"`{name}` must be a static Python {allowed}; got {value!r}. With "
            f"optax.inject_hyperparams, name it in static_args=('{name}',)."
        ) from None
    if not 1 <= number <= top:
        raise ValueError(f"`{name}` must lie in [1, {top}]; got {number}.")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The static options of :func:`distlion_jax.distributed_lion`; see there for their meaning."""

    aggregation: str = "majority"
    transport: str = "auto"
    ties: str = "zero"
    ballot: str = "binary"
    max_weight: int | None = None
    health: str = "total"
    chunks: int | None = None
    noise: bool = False

    def __post_init__(self) -> None:
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("transport", self.transport, TRANSPORTS)
        check_choice("ties", self.ties, TIES)
        check_choice("ballot", self.ballot, BALLOTS)
        check_choice("health", self.health, HEALTH)
        if self.max_weight is not None:
            check_static("max_weight", self.max_weight, "int or None", MAX_WEIGHT)
        if self.chunks is not None:  # no number by default: inject_hyperparams would trace it
            check_static("chunks", self.chunks, "int or None", MAX_CHUNKS)
        if self.chunks is not None and self.chunks > 1 and self.transport == "psum":
            raise ValueError(
                f"`chunks` {self.chunks} splits words, and transport='psum' sends none. Leave it "
                "out, or use 'auto', 'all_gather' or 'two_phase'."
            )

    def for_workers(self, n: int) -> "Rules":
        """The rules that n workers follow: one alone has nobody to tell, and its zeros abstain.

        So that n = 1 is Optax's Lion (without noise).
        """
        return self if n > 1 else dataclasses.replace(self, ballot="ternary")

    @property
    def top_weight(self) -> int:
        """The largest say of one worker: 1 unless weights are in use."""
        return 1 if self.max_weight is None else int(self.max_weight)

    @property
    def present_columns(self) -> int:
        """Presence words of a group: 1 (a bit a block) or 128 (a bit a coordinate)."""
        return 1 if self.ballot == "binary" else 128

    def verdict_columns(self, n: int) -> tuple[int, ...]:
        """Words a group of each plane of the verdict of n workers, as it travels."""
        planes = (n * self.top_weight).bit_length()
        if self.aggregation == "majority":
            by_block = self.ties == "coin" and self.ballot == "binary"
            return (128, 1) if by_block else (128, 128)
        return (128,) * planes + (1,) * planes if self.ballot == "binary" else (128,) * (planes + 1)

    def pieces(self, words: int) -> tuple[int, ...]:
        """How many of a phase's words each of its collectives carries: nearly equal shares."""
        chunks = min(self.chunks or 1, words)
        return tuple(words // chunks + (i < words % chunks) for i in range(chunks))
