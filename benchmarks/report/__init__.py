# SPDX-License-Identifier: Apache-2.0
"""Tables, pictures and pages of results; loads no trainer."""
