# SPDX-License-Identifier: Apache-2.0
"""Measurements, and the pages that show them: ``python -m benchmarks.WING.NAME`` in the checkout.

Wings: tasks (what is trained), quality, network, compute (what is measured), report (what is shown;
it loads no trainer), demo (the engine of examples/train.py). ``rows`` holds the rules of results.
"""
