# SPDX-License-Identifier: Apache-2.0
"""A corpus, or a part of it, in the forms that others read; and back again.

One format, one file: ``internvid`` (the published list), ``webdataset`` (tars), ``huggingface`` (a
dataset folder), ``interleaved`` (documents of clips and text), ``generation`` (files and a table for
text-to-video trainers). ``run`` does what a command asks for, ``pieces`` keeps files up to date with
the corpus, ``imports`` makes a corpus from an export.
"""
