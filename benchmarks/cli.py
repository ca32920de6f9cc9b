# SPDX-License-Identifier: Apache-2.0
"""What the commands share: a parser, errors in one line, a progress bar."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Something the user can mend: reported in one line, with exit code 2."""


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser that a module's docstring describes, and whose help shows defaults."""
    return argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def guarded(run: Callable[[argparse.Namespace], str], args: argparse.Namespace) -> int:
    """Runs, and prints what came out or one line of what went wrong; the exit code."""
    script = Path(sys.argv[0]).name
    try:
        print(run(args))
    except (UsageError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was done is kept", file=sys.stderr)
        return 130
    return 0


def progress(total: int, unit: str = "worker step") -> Any:
    """A bar, on a terminal."""
    from tqdm import tqdm  # printing a page needs none

    return tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True,
                disable=not sys.stderr.isatty())  # fmt: skip
