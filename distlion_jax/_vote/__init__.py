# SPDX-License-Identifier: Apache-2.0
"""The engine, internal: gradients and momenta in, one verdict out, the same on every worker.

    words coins wire costs | turnout noise ballot | frames tally verdict transports

A module may import those before it. Nothing here knows an optimizer, a train step or the ledger.
"""
