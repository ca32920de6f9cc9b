# SPDX-License-Identifier: Apache-2.0
"""Trains a small model with Distributed Lion beside full-precision Lion, and compares the two.

    python examples/train.py                # characters of Shakespeare, 3 to 5 minutes on 2 cores
    python examples/train.py --task images  # a classifier of real images
    python examples/train.py --quick        # a smoke test of 20 seconds

Needs ``pip install distlion_jax[examples]``; downloads nothing. On a machine without accelerators
it makes eight virtual CPU devices. See ``--help`` for the options, loop.py for the training loop,
methods.py for how the package is used.
"""

import sys
from pathlib import Path

from config import Config, UsageError, parse


def make_folder(folder: Path) -> None:
    """Makes the output folder and tries to write there, before any time is spent on training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from error


def run(config: Config) -> int:
    """Trains, reports, and returns the exit code: 0, or 130 after Ctrl-C."""
    import sources  # what is slow to import comes after the checks that need none of it

    data = sources.load(config)
    make_folder(config.out)
    import loop
    import report

    comparison = loop.compare(config, data)
    if comparison.reports:
        print("\n" + report.write(config, comparison))
        print(f"\n{config.out}: results.md, results.json, loss.png")
    return 130 if comparison.interrupted else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    try:
        return run(parse(argv))
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted before there was anything to write", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
