# SPDX-License-Identifier: Apache-2.0
"""Trains video foundation models on a corpus' Parquet shards as they are."""
