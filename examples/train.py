# SPDX-License-Identifier: Apache-2.0
"""Trains a small model with one-bit votes beside full-precision Lion and AdamW, and compares them.

    python examples/train.py                # characters of Shakespeare, 5 minutes on 2 cores
    python examples/train.py --task images  # a classifier of real images
    python examples/train.py --quick        # a smoke test of 20 seconds

Needs ``pip install distlion_jax[examples]``; downloads nothing. On a machine without accelerators
it makes eight virtual CPU devices. See ``--help`` for the options. The engine is benchmarks/demo:
loop.py is the training loop, methods.py shows how the package is used.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, for benchmarks.demo

from benchmarks.demo.main import main

if __name__ == "__main__":
    raise SystemExit(main())
