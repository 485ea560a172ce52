# SPDX-License-Identifier: Apache-2.0
"""What a person follows during training: a line every few steps, and the same as JSON lines."""

import json
import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)


class Progress:
    """Measures speed between log lines and writes them.

    Args:
        total_steps: Of the whole run.
        start_step: Steps done before this process started.
        clips_per_step: Of all processes together.
        path: File to append JSON lines to; None writes none.
    """

    def __init__(
        self, total_steps: int, start_step: int, clips_per_step: int, path: Path | None
    ) -> None:
        self._total_steps = total_steps
        self._clips_per_step = clips_per_step
        self._path = path
        self._last_step = start_step
        self._last_time = time.monotonic()
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Takes time spent on something else than training out of the next line's speed."""
        self._paused += seconds

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes one line for the steps since the last."""
        now = time.monotonic()
        elapsed = max(now - self._last_time - self._paused, 1e-9)
        rate = (step - self._last_step) / elapsed
        self._last_step, self._last_time, self._paused = step, now, 0.0
        left_s = round((self._total_steps - step) / rate) if rate else 0
        values = {**values, "clips_per_s": rate * self._clips_per_step}
        logger.info(
            "step %d/%d  loss %.3f  %.0f clips/s  lr %.2e  temp %.4f  grad %.2f  eta %d:%02d",
            step,
            self._total_steps,
            values["loss"],
            values["clips_per_s"],
            values["lr"],
            values["temperature"],
            values["grad_norm"],
            left_s // 60,
            left_s % 60,
        )
        self.write(step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends numbers to the JSON lines."""
        if self._path:
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
