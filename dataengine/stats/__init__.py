# SPDX-License-Identifier: Apache-2.0
"""What a corpus is made of, in numbers and pictures, and how two corpora differ."""
