# SPDX-License-Identifier: Apache-2.0
"""The command line of examples/train.py: checks, data, training, report."""

import sys
from pathlib import Path

from benchmarks.cli import UsageError
from benchmarks.demo.config import Config, parse


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
    from benchmarks.tasks import data as sources  # slow to import: after the checks above

    if config.task == "text":
        data = sources.load_corpus(config.corpus, config.eval_rows)
    else:
        data = sources.load_images(config.images_dir, config.eval_rows)
    make_folder(config.out)
    from benchmarks.demo import loop, report

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
