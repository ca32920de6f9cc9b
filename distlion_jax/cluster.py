# SPDX-License-Identifier: Apache-2.0
"""Processes find each other, or all end with an error that says what is wrong.

In:  what this process was told: an address, how many processes, which one it is.
Out: an initialised ``jax.distributed``, or a ``RuntimeError`` on every process within the timeout.

JAX's own rendezvous aborts a process that waits in vain: a stack trace, no exception. It takes one
process's count for everybody's, and lets different versions of a program meet. So the processes
check in first, over one plain TCP connection each. Process 0 hears what all believe, and answers
all with the same verdict.
"""

import contextlib
import json
import platform
import socket
import time
from typing import Any

import jax
import jaxlib
import numpy as np
import optax
from jax.experimental import multihost_utils

from distlion_jax._version import __version__

_CARD = 1024  # bytes of a card, where it travels as an array


def coordinator() -> Any:
    """The key-value store of JAX's processes, which has no public name; None if there is none."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import distributed

        return distributed.global_state.client
    return None


def fingerprint(program: str = "") -> dict[str, str]:
    """What must be the same in all processes: versions, and what the caller adds."""
    versions = {module.__name__: module.__version__ for module in (jax, jaxlib, optax)}
    python = ".".join(platform.python_version_tuple()[:2])
    return {**versions, "distlion_jax": __version__, "python": python, "program": program[:200]}


def _judge(cards: dict[int, dict[str, Any]], n: int) -> str:
    """What is wrong with those who checked in, or nothing; process 0's card is right."""
    for i, card in sorted(cards.items()):
        for name, value in cards[0].items():
            if card.get(name) != value:
                return (
                    f"process {i} has {name} {card.get(name)!r}, process 0 has {value!r}: all must "
                    "run the same program, with the same count and the same versions"
                )
    if missing := sorted(set(range(n)) - set(cards)):
        return f"of {n} processes {missing} did not check in"
    return ""


def _raise_if(wrong: str, process: int, n: int, where: str) -> None:
    if wrong:
        raise RuntimeError(f"process {process} of {n} could not start: {wrong} ({where}).")


def _read(call: socket.socket, seconds: float) -> tuple[int, dict[str, Any]] | None:
    """Who calls, and its card; None for somebody who is none of us."""
    call.settimeout(seconds)
    try:
        with call.makefile() as lines:
            index, card = json.loads(lines.readline(_CARD))
        return int(index), dict(card)
    except (OSError, ValueError, TypeError):
        return None


def _host(address: tuple[str, int], card: dict[str, Any], n: int, deadline: float) -> str:
    """Process 0: hears all others until the deadline, and answers them; returns what is wrong."""
    cards, wrong = {0: card}, ""
    with contextlib.ExitStack() as open_calls:
        try:
            server = open_calls.enter_context(socket.create_server(("", address[1])))
        except OSError as error:
            return f"port {address[1]} cannot be listened on ({error.strerror}), as after a join"
        calls = []
        while len(cards) < n and not wrong and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                call = open_calls.enter_context(server.accept()[0])
            except TimeoutError:
                break
            if (caller := _read(call, min(5.0, left))) is None:
                continue
            index, other = caller
            calls.append(call)
            if index in cards:
                wrong = f"two processes say that they are process {index} of {n}"
            elif not 0 < index < n:
                wrong = f"process {index} is not one of {n}"
            else:
                cards[index] = other
                wrong = _judge(cards, 0)
        wrong = wrong or _judge(cards, n)
        for call in calls:
            with contextlib.suppress(OSError):  # one that has died is told nothing
                call.sendall(json.dumps(wrong).encode() + b"\n")
    return wrong


def _call(address: tuple[str, int], index: int, card: dict[str, Any], deadline: float) -> str:
    """Another process: calls process 0 until it answers; returns what is wrong."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as call:
                call.sendall(json.dumps([index, card]).encode() + b"\n")
                call.settimeout(left + 5.0)  # process 0 may have begun to wait later
                with call.makefile() as lines:
                    if answer := lines.readline():
                        return str(json.loads(answer))
        except OSError:
            pass
        except ValueError:
            return f"somebody else answers at {address[0]}:{address[1]}, as after a second join"
        time.sleep(0.1)
    return "process 0 did not answer"


def check_in(
    coordinator_address: str, num_processes: int, process_id: int, program: str, timeout: float
) -> None:
    """Raises ``RuntimeError``, on every process, unless all of them check in and agree."""
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"`coordinator_address` must be host:port; got {coordinator_address!r}. It is where "
            "process 0 can be reached by all."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"`process_id` must lie in [0, num_processes={num_processes}); got {process_id}."
        )
    address, card = (host, int(port)), {"processes": num_processes, **fingerprint(program)}
    deadline = time.monotonic() + timeout
    if process_id == 0:
        wrong = _host(address, card, num_processes, deadline)
    else:
        wrong = _call(address, process_id, card, deadline)
    _raise_if(wrong, process_id, num_processes, f"at {address[0]}:{address[1]}, in {timeout:g} s")


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    program: str = "",
    timeout: float = 60.0,
) -> None:
    """Makes this process one of several: ``jax.distributed.initialize``, with clear errors.

    Call it before anything else of JAX runs. With no arguments JAX finds the others itself, where
    it can: on SLURM, Open MPI, Kubernetes and Cloud TPU.

    Args:
      coordinator_address: ``host:port`` where process 0 can be reached.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      program: anything else that must be the same in all processes (a hash of the source, say).
      timeout: seconds to wait for the others.

    Raises:
      RuntimeError: on every process, within about the timeout, if a process is missing or there
        are two of one; if they differ in their count, their versions or ``program``.
      ValueError: for an address without a port, a process that is not one of them, or arguments
        of which only some are given.

    Examples:
      >>> import socket
      >>> with socket.socket() as s:
      ...     s.bind(("127.0.0.1", 0))
      ...     port = s.getsockname()[1]
      >>> try:
      ...     join(f"127.0.0.1:{port}", num_processes=2, process_id=0, timeout=0.2)
      ... except RuntimeError as error:
      ...     print(str(error).split(" (")[0])
      process 0 of 2 could not start: of 2 processes [1] did not check in
    """
    given = (coordinator_address, num_processes, process_id)
    if all(x is None for x in given):
        jax.distributed.initialize(initialization_timeout=round(timeout))
        _compare(program)
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ValueError(
            f"`coordinator_address`, `num_processes` and `process_id` go together; got {given}. "
            "Give all, or none to let JAX find them."
        )
    check_in(coordinator_address, num_processes, process_id, program, timeout)
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, initialization_timeout=round(timeout)
    )


def _compare(program: str) -> None:
    """The same comparison where JAX has found the processes: by an all-gather of the cards."""
    n = jax.process_count()
    card = json.dumps({"processes": n, **fingerprint(program)}).encode()
    mine = np.frombuffer(card.ljust(_CARD), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(n, _CARD)
    cards = {i: json.loads(bytes(row)) for i, row in enumerate(rows)}
    _raise_if(_judge(cards, n), jax.process_index(), n, "found by JAX")
