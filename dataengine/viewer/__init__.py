# SPDX-License-Identifier: Apache-2.0
"""A local web page to filter, watch and read the clips of a corpus."""
