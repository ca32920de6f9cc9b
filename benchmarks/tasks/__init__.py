# SPDX-License-Identifier: Apache-2.0
"""What is trained: models, data, and who holds which rows."""

from pathlib import Path

CORPUS = Path(__file__).resolve().parents[2] / "examples" / "data" / "shakespeare.txt.gz"
