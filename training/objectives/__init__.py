# SPDX-License-Identifier: Apache-2.0
"""Losses: plain functions of features, beside their references."""
