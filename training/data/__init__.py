# SPDX-License-Identifier: Apache-2.0
"""Corpus -> batches: the index, the order of an epoch, the reading of row groups."""
