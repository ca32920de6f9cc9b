# SPDX-License-Identifier: Apache-2.0
"""Compiles real TPU programs without a TPU: ``pip install libtpu`` (Linux) makes it possible.

In:  a module of tests that runs as a program (``python -m tests.test_tpu FILE``), and writes there
     what it read out of its programs.
Out: what it wrote. A process of its own leaves the backend of the other tests alone.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import distlion_jax as dl

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 400  # seconds for all programs of a module; a quiet machine takes a seventh


def chips(topology, **more):
    """The devices of one or several slices, each slice's together."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    return sorted(found, key=lambda chip: (getattr(chip, "slice_index", 0), chip.id))


def write(programs):
    pathlib.Path(sys.argv[1]).write_text(json.dumps(programs))


def read_elsewhere(module, folder):
    """What the module wrote: of each program, lists of collectives and numbers."""
    pytest.importorskip("libtpu", reason="TPU programs need libtpu: pip install libtpu")
    file = folder / "programs.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-m", module, str(file)],
        cwd=ROOT,
        # The last: beside another process that has it loaded, or has left its lock behind.
        env=env
        | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return {
        name: {
            key: [dl.Collective(*one) for one in value] if isinstance(value, list) else value
            for key, value in program.items()
        }
        for name, program in json.loads(file.read_text()).items()
    }
