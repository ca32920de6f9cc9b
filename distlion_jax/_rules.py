# SPDX-License-Identifier: Apache-2.0
"""The options of a vote: their names, types, defaults and checks, once for every signature.

``OPTIONS`` says what each means. :class:`VoteOptions` is what a type checker sees of ``**options``.
:class:`Rules` holds the defaults and checks them where they are chosen. For a new option add to
these three, and write the code that reads it: :func:`takes_vote_options` shows it in the signatures
and docstrings of all factories.

Errors name the argument, the value, what is allowed and the way out.
"""

import dataclasses
import difflib
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, get_args

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

Aggregation = Literal["majority", "average"]
Transport = Literal["auto", "all_gather", "two_phase", "psum"]
Ties = Literal["zero", "coin"]
BallotKind = Literal["binary", "ternary"]
HealthDetail = Literal["off", "total", "leaf"]
AxisName = str | tuple[str, ...]

TRANSPORTS: tuple[str, ...] = get_args(Transport)

MAX_WEIGHT = 2**16 - 1
MAX_CHUNKS = 64

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of the allowed names."""
    if value not in allowed:
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"`{name}` must be one of {names}; got {value!r}.")


def concrete_value(value: Any) -> np.ndarray | None:
    """The value of a number that is known now; None for a traced one."""
    return None if isinstance(value, Tracer) else np.asarray(value)


def _is_scalar(number: np.ndarray) -> bool:
    """Whether it is one real number, and not a function or a string."""
    return number.ndim == 0 and np.isrealobj(number) and number.dtype.kind not in "OSU"


def check_fraction(name: str, value: Any) -> None:
    """Raises unless a number lies in [0, 1); a traced one is let through."""
    number = concrete_value(value)
    if number is not None and not (_is_scalar(number) and 0.0 <= number < 1.0):
        raise ValueError(f"`{name}` must lie in [0, 1); got {value!r}.")


def check_from_zero(name: str, value: Any) -> None:
    """Raises unless a number is finite and at least 0; None and a traced one are let through."""
    number = None if value is None else concrete_value(value)
    if number is not None and not (_is_scalar(number) and 0 <= number < float("inf")):
        raise ValueError(f"`{name}` must be a finite number of at least 0; got {value!r}.")


def check_static(name: str, value: Any, allowed: str, top: int, least: int = 1) -> None:
    """Raises unless ``value`` is a Python integer in [least, top], known when tracing."""
    try:
        number = operator.index(value)
    except Exception:  # a tracer raises its own error here
        raise ValueError(
            f"`{name}` must be a static Python {allowed}; got {value!r}. With "
            f"optax.inject_hyperparams, name it in static_args=('{name}',)."
        ) from None
    if not least <= number <= top:
        raise ValueError(f"`{name}` must lie in [{least}, {top}]; got {number}.")


def by_params(tree: Any) -> Callable[[Any], Any]:
    """A tree, or a function of the parameters that returns one, as such a function.

    A pytree that can be called, such as a model in Equinox, is a tree.
    """
    is_function = callable(tree) and jax.tree_util.all_leaves([tree])
    return tree if is_function else lambda _: tree


OPTIONS = """\
transport: how votes travel: ``"all_gather"``, ``"two_phase"``, or ``"psum"``, which is
  uncompressed and for checking. ``"auto"`` takes the fewest bytes by
  :func:`distlion_jax.wire_cost`. The result is the same, bit for bit.
ties: what a tied coordinate does. ``"zero"``: it does not move (the paper's sign(0) = 0), and
  the verdict travels as two bits. ``"coin"``: a fair coin of (round, coordinate) decides; the
  verdict travels as one bit, or two with ternary ballots.
ballot: ``"binary"`` sends 1 bit a parameter, and a presence bit a block of 128. A block of
  exact zeros abstains, an isolated zero votes by a fair coin. ``"ternary"`` sends 2 bits, and
  every zero abstains.
threshold: for ternary ballots: blends with absolute value up to this abstain. None: 0.
noise: amplitude of uniform noise that is added before the sign, in units of the leaf's
  root-mean-square blend over all workers (try 2); None: no noise. Larger blends then win more
  votes, which can help where workers hold different data. It costs an all-reduce of one
  number a leaf.
max_weight: largest ``weight`` of a worker; None: weights are not in use.
health: what the state's :class:`distlion_jax.VoteHealth` holds of the last round.
  ``"total"``: figures of the whole tree. ``"leaf"``: figures of each leaf, in
  ``jax.tree.leaves`` order, which costs more. ``"off"``: nothing.
chunks: how many collectives carry each phase; None: 1. With gloo (CPU) on links below
  1 Gbit/s, 8 is quicker: a worker's ready-to-receive message queues behind the data it sends.
seed: of coins and noise; None: 0. Runs with other seeds toss independent coins.
allow_single_worker: whether an axis of size 1 is meant.
"""
DOCUMENTED = "  **options: as listed below."  # where the text goes in a factory's docstring


class VoteOptions(TypedDict, total=False):
    """The options of a vote that every factory of one takes: the names and types of ``OPTIONS``."""

    transport: Transport
    ties: Ties
    ballot: BallotKind
    threshold: ArrayLike | None
    noise: ArrayLike | None
    max_weight: int | None
    health: HealthDetail
    chunks: int | None
    seed: int | None
    allow_single_worker: bool


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a vote follows; ``OPTIONS`` says what each means.

    ``threshold`` and ``noise`` may be traced. All else is a Python value and decides shapes, bytes
    or semantics. The numbers are ``None`` by default where ``optax.inject_hyperparams`` would
    trace them.
    """

    aggregation: Aggregation = "majority"
    transport: Transport = "auto"
    ties: Ties = "zero"
    ballot: BallotKind = "binary"
    threshold: ArrayLike | None = None
    noise: ArrayLike | None = None
    max_weight: int | None = None
    health: HealthDetail = "total"
    chunks: int | None = None
    seed: int | None = None
    allow_single_worker: bool = False

    def __post_init__(self) -> None:
        check_choice("aggregation", self.aggregation, get_args(Aggregation))
        check_choice("transport", self.transport, TRANSPORTS)
        check_choice("ties", self.ties, get_args(Ties))
        check_choice("ballot", self.ballot, get_args(BallotKind))
        check_choice("health", self.health, get_args(HealthDetail))
        if self.threshold is not None and self.ballot != "ternary":
            raise ValueError(
                f"`threshold` {self.threshold!r} needs ballot='ternary': one bit a parameter "
                "cannot abstain."
            )
        check_from_zero("threshold", self.threshold)
        check_from_zero("noise", self.noise)
        if self.max_weight is not None:
            check_static("max_weight", self.max_weight, "int or None", MAX_WEIGHT)
        if self.chunks is not None:
            check_static("chunks", self.chunks, "int or None", MAX_CHUNKS)
        if self.seed is not None:
            check_static("seed", self.seed, "int or None", 2**32 - 1, least=0)
        if self.chunks is not None and self.chunks > 1 and self.transport == "psum":
            raise ValueError(
                f"`chunks` {self.chunks} splits words, and transport='psum' sends none. Leave it "
                "out, or use 'auto', 'all_gather' or 'two_phase'."
            )

    def for_workers(self, n: int) -> "Rules":
        """The rules that n workers follow: one alone has nobody to tell, and its zeros abstain.

        So n = 1 is Optax's Lion (without noise).
        """
        return self if n > 1 else dataclasses.replace(self, ballot="ternary")

    @property
    def dead_zone(self) -> ArrayLike:
        """Blends up to this abstain."""
        return 0.0 if self.threshold is None else self.threshold

    @property
    def top_weight(self) -> int:
        """The largest say of one worker: 1 unless weights are in use."""
        return 1 if self.max_weight is None else int(self.max_weight)


def takes_vote_options(factory: Callable[_P, _R]) -> Callable[_P, _R]:
    """Shows the options of a vote in signature and docstring of a factory that takes ``**options``.

    ``help`` and ``optax.inject_hyperparams`` read them there. An unknown option is refused with the
    nearest known one.
    """
    shown = inspect.signature(factory)
    named = [p for p in shown.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in dataclasses.fields(Rules)
        if field.name in VoteOptions.__annotations__
    ]
    signature = shown.replace(parameters=[*named, *options])

    @functools.wraps(factory)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in signature.parameters:
                near = difflib.get_close_matches(name, signature.parameters, 1)
                hint = f" Did you mean `{near[0]}`?" if near else ""
                raise TypeError(f"{factory.__name__}() has no argument `{name}`.{hint}")
        return factory(*args, **kwargs)

    # Python 3.13 takes the indentation off docstrings, older ones do not.
    written, wanted = inspect.cleandoc(factory.__doc__ or ""), textwrap.indent(OPTIONS, "  ")
    assert DOCUMENTED in written, factory.__name__
    checked.__doc__ = written.replace(DOCUMENTED, wanted.rstrip())
    setattr(checked, "__signature__", signature)  # noqa: B010 (functions have no such field)
    return checked
