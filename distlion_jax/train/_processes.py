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
import itertools
import json
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from distlion_jax.cluster import coordinator

_steps = itertools.count()  # in the order in which they are made, which is that of the program
_LOOK_EVERY = 1.0  # seconds
_GRACE = 5.0  # seconds that a step may still take after another process has said that it will stop


def spans_processes(devices: Iterable[Any]) -> bool:
    """Whether the devices belong to more than one process."""
    return len({device.process_index for device in devices}) > 1


class Company:
    """The processes of one step, as one of them sees them; alone, it does nothing.

    Args:
      devices: of all workers.
    """

    def __init__(self, devices: Iterable[Any]) -> None:
        self.several = spans_processes(devices)
        self.calls = 0
        self._shapes = 0
        if self.several:
            self._prefix = f"distlion_jax/step{next(_steps)}/"
            self._me = jax.process_index()
            atexit.register(self._tell, "ended", "ended")

    def _tell(self, key: str, what: str) -> None:
        store = coordinator()
        if store is not None:
            word = json.dumps([self._me, self.calls, what[:500]])
            with contextlib.suppress(Exception):  # the service may be gone: nobody waits then
                store.key_value_set(f"{self._prefix}{key}/{self._me}", word, True)

    def _told(self) -> Iterator[tuple[str, int, int, str]]:
        store = coordinator()
        words: Any = []
        if store is not None:
            with contextlib.suppress(Exception):
                words = store.key_value_dir_get(self._prefix)
        for key, word in words:
            who, call, what = json.loads(word)
            if who != self._me:
                yield key.removeprefix(self._prefix).split("/")[0], who, call, what

    @contextlib.contextmanager
    def call(self, *arguments: Any) -> Iterator[None]:
        """One call of the step: the others are told if it raises, and if its shapes are new."""
        if not self.several:
            yield
            return
        self.calls += 1
        try:
            shapes = [
                (np.shape(x), str(getattr(x, "dtype", ""))) for x in jax.tree.leaves(arguments)
            ]
            if (new := zlib.crc32(repr(shapes).encode())) != self._shapes:
                self._shapes = new
                self._tell(f"shapes{self.calls}", str(new))
            yield
        except Exception as error:
            self._tell("raised", f"{type(error).__name__}: {error}")
            raise

    def wait(self, arrays: Any) -> None:
        """Waits for arrays, or raises a ``RuntimeError`` with what another process has said."""
        failed: list[BaseException] = []

        def block() -> None:
            try:
                jax.block_until_ready(arrays)
            except BaseException as error:  # it is raised where somebody sees it
                failed.append(error)

        waiting = threading.Thread(target=block, daemon=True)
        waiting.start()
        heard, reason = 0.0, ""
        while True:
            waiting.join(_LOOK_EVERY)
            if not waiting.is_alive():
                break
            if not reason:
                reason, heard = self._reason(), time.monotonic()
            if reason and time.monotonic() - heard > _GRACE:
                raise RuntimeError(reason)
        if failed:
            raise failed[0]

    def _reason(self) -> str:
        """Why another process will not come to this call, if it has said so."""
        for kind, who, call, what in self._told():
            if kind == "raised" and call <= self.calls:
                return (
                    f"process {who} raised in call {call} of the step, and this process waits in "
                    f"call {self.calls}: {what}"
                )
            if kind == "ended" and call < self.calls:
                return (
                    f"process {who} ended after {call} calls of the step, and this process waits "
                    f"in call {self.calls}. Give all processes the same number of batches."
                )
            if kind == f"shapes{self.calls}" and what != str(self._shapes):
                return (
                    f"process {who} was given arguments of other shapes or dtypes in call "
                    f"{self.calls} of the step. All processes pass the same shapes: drop the last, "
                    "short batch on all of them."
                )
        return ""
