# SPDX-License-Identifier: Apache-2.0
"""Several processes run one step: what goes wrong in one of them is said in all.

In:  what this process is about to run, or why it cannot. Out: a wait that ends with the reason,
     where another process has said that it will not come.

A collective waits for all. Where one process raises, or ends its loop early, the others wait inside
a compiled program, where no Python exception can reach them. So a process leaves word with JAX's
own coordination service, and those that wait longer than a moment look there.
"""

import atexit
import contextlib
import functools
import itertools
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from distlion_jax.cluster import coordinator
from distlion_jax.train._notes import warn

_steps = itertools.count()  # of steps, by their first calls, which all processes make in one order
_LOOK_EVERY = 5.0  # seconds; shorter steps cost the coordinator nothing
_GRACE = 5.0  # seconds that a step may still take after another process has said that it will stop
_BEAT_EVERY = 5.0  # seconds between signs of life
# Seconds without one, after which a process is taken for dead. Python code that never lets another
# thread run, such as the unpickling of a large object, is silent too; JAX itself waits for 100 s.
_SILENCE = 60.0
_WAITED = " of the step, and "  # in what a process raises because another one will not come
_PATIENCE = 60.0  # seconds of waiting, after which a word is said


_CURES = {  # by the name of what differs
    "the program": (
        "Options, the loss function, or JAX's configuration differ: give all processes the same. "
        "If the code goes through sets, begin all processes with PYTHONHASHSEED=0."
    ),
    "shapes": (
        "All processes pass the same shapes and dtypes: drop the last, short batch on all of them."
    ),
    "": (
        "Set or restore it alike on all processes: the same checkpoint, step and hyperparameters."
    ),
}


def spans_processes(devices: Iterable[Any]) -> bool:
    """Whether the devices belong to more than one process."""
    return len({device.process_index for device in devices}) > 1


class Word(NamedTuple):
    """What a process has said."""

    kind: str  # "raised", "ended", "alive", or "new" with the number of the call
    process: int
    call: int  # the calls of the step that it had begun
    what: str


class Watch:
    """What one that waits in a call makes of what the others say.

    Args:
      call: the number of the call.
      new: the last call in which this process began anew, see :meth:`Company.agree`.
      told: what all others have said so far.
      began: when the wait began, in seconds.
    """

    def __init__(self, call: int, new: int, told: Callable[[], list[Word]], began: float) -> None:
        self.call, self.new, self.told, self.began = call, new, told, began
        self.me = f"process {jax.process_index()}"
        self.reason, self.since = "", 0.0
        self.beats: dict[int, tuple[str, float]] = {}
        self.warned = False

    def look(self, now: float) -> None:
        """Raises where there is a reason; says a word where the wait is long.

        ``now`` is in seconds, on the clock of ``began``.
        """
        words = self.told()
        if (reason := self._reason(words)) != self.reason:  # none, where one that raised goes on
            self.reason, self.since = reason, now
        if self.reason and now - self.since >= _GRACE:
            raise RuntimeError(self.reason)
        for word in (w for w in words if w.kind == "alive"):
            what, since = self.beats.setdefault(word.process, (word.what, now))
            if what != word.what:
                self.beats[word.process] = word.what, now
            elif now - since >= _SILENCE:
                raise RuntimeError(
                    f"process {word.process} has given no sign of life for {now - since:.0f} s, "
                    f"and {self.me} waits for it in call {self.call} of the step. It was killed, "
                    "or has dropped its step: see its log."
                )
        behind = sorted({w.process for w in words if w.kind == "alive" and w.call < self.call})
        if behind and now - self.began >= _PATIENCE and not self.warned:
            self.warned = True
            warn(
                f"waiting for {now - self.began:.0f} s in call {self.call} of the step for "
                f"processes {behind}, which have not begun it. All processes must call the step as "
                "often as each other."
            )

    def _reason(self, words: list[Word]) -> str:
        # Last who raised because of another one; and what one raised before that it ended by it.
        told = {word.process for word in words if word.kind == "raised" and _WAITED in word.what}
        for word in sorted(words, key=lambda word: (word.process in told, word.kind != "raised")):
            if word.kind == "raised" and word.what and word.call <= self.call:
                return (
                    f"process {word.process} raised in call {word.call}{_WAITED}"
                    f"{self.me} waits in call {self.call}: {word.what}"
                )
            if word.kind == "ended" and word.call < self.call:
                return (
                    f"process {word.process} ended after {word.call} calls{_WAITED}"
                    f"{self.me} waits in call {self.call}. "
                    + (word.what or "Give all processes the same number of batches.")
                )
            if word.kind.startswith("new") and self.new < word.call <= self.call:
                return (
                    f"process {word.process} was given other shapes, or a state (or parameters) "
                    f"that the step had not returned, in call {word.call}; {self.me} was not. "
                    "All processes pass the same shapes (drop the last, short batch on all of "
                    "them), and set or restore a state together."
                )
        return ""


_ENDED = "distlion_jax/ended/"  # where a process says that it ends, of whatever step


def _say(place: str, word: list[Any]) -> None:
    store = coordinator()
    if store is not None:
        with contextlib.suppress(Exception):  # the service may be gone: nobody waits then
            store.key_value_set(f"{place}{word[0]}", json.dumps(word), True)


def _heard(place: str) -> list[tuple[str, str]]:
    """Keys under a place, and what they hold."""
    store = coordinator()
    if store is not None:
        with contextlib.suppress(Exception):
            return store.key_value_dir_get(place)
    return []


_stuck: list[Any] = []  # arrays of programs that will not end
_companies: weakref.WeakSet["Company"] = weakref.WeakSet()  # of the steps that were called


@functools.cache
def _give_signs_of_life() -> None:
    """Of this process, for all its steps, until it ends."""

    def beat() -> None:
        for number in itertools.count():
            for company in list(_companies):
                company.tell("alive", str(number))
            time.sleep(_BEAT_EVERY)

    def end() -> None:
        error = getattr(sys, "last_value", None)
        reason = "" if error is None else f"It raised {type(error).__name__}: {error}"
        for company in list(_companies):
            company.tell("ended", reason)
        _say(_ENDED, [jax.process_index(), 0, reason])  # to those whose step it never called

    atexit.register(end)
    threading.Thread(target=beat, daemon=True).start()


class Company:
    """The processes of one step, as one of them sees them; alone, it does nothing.

    Args:
      devices: of all workers.
    """

    def __init__(self, devices: Iterable[Any]) -> None:
        devices = list(devices)
        here = {device.process_index for device in devices}
        self.several = len(here) > 1
        self.calls = 0
        self._me = jax.process_index()
        self._others = here - {self._me}
        self._prefix = ""
        self._new = self._before = 0  # the last calls in which this process began anew
        self._raised = False
        self.counts = False  # whether all have made this call, were it to raise
        if self._me not in here:
            raise ValueError(
                f"`mesh` (or `devices`) holds no device of this process, {self._me} of "
                f"{jax.process_count()}: it would take no part, in silence. Use the devices of all "
                "processes, as worker_mesh() does."
            )
        if self.several:
            _give_signs_of_life()
        elif jax.process_count() > 1:
            warn(
                f"this step is of process {self._me} alone, of {jax.process_count()}: its devices "
                "are all here, and it trains apart from the others. worker_mesh(), and pmap over "
                "jax.devices(), span all processes."
            )

    def tell(self, kind: str, what: str) -> None:
        """Leaves word of one kind for the other processes; the last one counts."""
        _say(f"{self._prefix}{kind}/", [self._me, self.calls, what])

    def _told(self) -> list[Word]:
        words = _heard(self._prefix)
        kinds = ((key.removeprefix(self._prefix).split("/")[0], word) for key, word in words)
        heard = [Word(kind, *json.loads(word)) for kind, word in kinds]
        ended = {word.process for word in heard if word.kind == "ended"}
        last = [Word("ended", *json.loads(word)) for _, word in _heard(_ENDED)]
        heard += [word for word in last if word.process not in ended]
        return [word for word in heard if word.process in self._others]

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call of the step; the others are told if it raises."""
        if not self.several:
            yield
            return
        if not self._prefix:
            self._prefix = f"distlion_jax/step{next(_steps)}/"
            _companies.add(self)
        self.calls += 1
        self.counts = False
        if self._raised:  # it goes on
            self._raised = False
            self.tell("raised", "")
        try:
            yield
        except BaseException as error:
            self._raised = True
            self.tell("raised", f"{type(error).__name__}: {error}"[:500])
            if not self.counts:  # it may be tried again: the others still wait in this call
                self.calls -= 1
            raise

    def agree(self, card: dict[str, str]) -> None:
        """Raises unless all processes begin anew in this call, with the same card.

        Args:
          card: what must be the same in all processes, by name, in few words.
        """
        store = coordinator()
        if store is None:
            warn(
                "this JAX has no key-value store of its processes, so what they are about to run "
                "is not compared. Start them with jax.distributed.initialize or distlion_jax.join."
            )
            return
        if self._new != self.calls:
            # Who reads may be one such call behind, never two: it had to speak in the last one.
            with contextlib.suppress(Exception):
                store.key_value_delete(f"{self._prefix}new{self._before}/{self._me}")
            self._before, self._new = self._new, self.calls
        mine = f"new{self.calls}"
        self.tell(mine, json.dumps(card))
        watch = Watch(self.calls, self._new, self._told, time.monotonic())
        pause, looked = 0.01, time.monotonic()
        while True:
            cards = {
                word.process: json.loads(word.what) for word in self._told() if word.kind == mine
            }
            for process, other in sorted(cards.items()):
                for name in sorted({*card, *other}):
                    if card.get(name) != other.get(name):
                        self.counts = True  # all see it
                        raise ValueError(
                            f"{name} differs between process {process} and this one, "
                            f"{self._me}, in call {self.calls} of the step ({other.get(name)} "
                            f"and {card.get(name)}). {_CURES.get(name, _CURES[''])}"
                        )
            if set(cards) == self._others:
                return
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            if time.monotonic() - looked > _LOOK_EVERY:
                looked = time.monotonic()
                watch.look(looked)

    def wait(self, arrays: Any, uses: Any) -> None:
        """Waits for arrays; raises a ``RuntimeError`` where another process will not come.

        Args:
          arrays: of a program that was started.
          uses: all arrays of that program. If it will not end, they are held for good: before JAX
            0.8, to free them would wait for it.
        """
        failed: list[BaseException] = []

        def block() -> None:
            try:
                jax.block_until_ready(arrays)
            except BaseException as error:  # it is raised where somebody sees it
                failed.append(error)

        waiting = threading.Thread(target=block, daemon=True)
        waiting.start()
        watch = Watch(self.calls, self._new, self._told, time.monotonic())
        while waiting.is_alive():
            waiting.join(_LOOK_EVERY)
            if waiting.is_alive():
                try:
                    watch.look(time.monotonic())
                except RuntimeError:
                    _stuck.append(uses)
                    raise
        if failed:
            raise failed[0]
