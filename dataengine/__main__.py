# SPDX-License-Identifier: Apache-2.0
"""``python -m dataengine`` is the command ``dataengine``."""

from dataengine.cli import main

main()
