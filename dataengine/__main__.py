# SPDX-License-Identifier: Apache-2.0
"""``dataengine`` and ``python -m dataengine``."""

import sys


def main() -> None:
    """Runs the command line, or says what is missing where only the trainer is installed."""
    try:
        from dataengine.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dataengine"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}, which is not installed\n\n"
            "hint: pip install 'dataengine[ingest]' (here: uv sync --extra ingest --extra train)"
        )
    run()


if __name__ == "__main__":
    main()
