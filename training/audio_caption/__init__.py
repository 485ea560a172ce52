# SPDX-License-Identifier: Apache-2.0
"""Training of the audio captioner: a Q-Former between BEATs and a language model."""
