# SPDX-License-Identifier: Apache-2.0
"""What a person follows during training: a line every few steps, the same as JSON lines, trackers."""

import json
import logging
import time
from pathlib import Path

from training.trackers import Tracker

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Progress:
    """Measures speed between log lines and writes them. Only the main process has one.

    Args:
        total_steps: Of the whole run.
        start_step: Steps done before this process started; what the file says of later ones is cut
            off, because they are done again.
        path: File to append JSON lines to.
        trackers: Where the numbers also go.
    """

    def __init__(
        self, total_steps: int, start_step: int, path: Path, trackers: tuple[Tracker, ...] = ()
    ) -> None:
        self._total_steps = total_steps
        self._path = path
        self._trackers = trackers
        self._last_step = start_step
        self._last_time = time.monotonic()
        self._paused = self._waited = 0.0
        self._clips = 0
        self._flops = 0.0
        _cut_after(path, start_step)

    def pause(self, seconds: float) -> None:
        """Takes time spent on something else than training out of the next line's speed."""
        self._paused += seconds

    def count(self, clips: int, flops: float, waited_s: float) -> None:
        """Counts a step in.

        Args:
            clips: Of all processes together.
            flops: Model FLOPs that the step cost a process; 0 if not known.
            waited_s: Time in which the step waited for its clips.
        """
        self._clips += clips
        self._flops += flops
        self._waited += waited_s

    def log(
        self, step: int, values: dict[str, float], peak_flops: float | None, kind: str = ""
    ) -> None:
        """Writes one line: losses of this step, speed of the steps since the last line.

        Args:
            step: Steps done.
            values: ``loss``, ``lr`` and ``grad_norm`` among them.
            kind: Of media, where kinds take turns and losses of one cannot be compared with another's.
            peak_flops: Of the device, FLOPs a second; None leaves the utilisation out.
        """
        now = time.monotonic()
        elapsed = max(now - self._last_time - self._paused, 1e-9)
        rate = (step - self._last_step) / elapsed
        values = {**values, "clips_per_s": self._clips / elapsed, "waiting": self._waited / elapsed}
        if peak_flops and self._flops:
            values["mfu"] = self._flops / elapsed / peak_flops
        self._last_step, self._last_time = step, now
        self._paused = self._waited = self._flops = 0.0
        self._clips = 0
        left_s = round((self._total_steps - step) / rate) if rate else 0
        known = {"loss", "lr", "grad_norm", "clips_per_s", "waiting", "mfu", "skipped_steps"}
        others = "".join(f"  {n} {v:.4g}" for n, v in values.items() if n not in known)
        logger.info(
            "step %d/%d%s  loss %.4f%s  grad %.2f  lr %.2e  %.0f clips/s%s%s  eta %d:%02d",
            step,
            self._total_steps,
            f"  {kind}" if kind else "",
            values["loss"],
            others,
            values["grad_norm"],
            values["lr"],
            values["clips_per_s"],
            f"  MFU {100 * values['mfu']:.1f} %" if "mfu" in values else "",
            # Worth a word only where reading holds the training up.
            f"  waiting {100 * values['waiting']:.0f} %" if values["waiting"] > 0.05 else "",
            left_s // 60,
            left_s % 60,
        )
        self.write(step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends numbers to the JSON lines and to the trackers."""
        rounded = {name: float(f"{value:.9g}") for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, rounded)

    def close(self) -> None:
        """Lets trackers write what they hold back."""
        for tracker in self._trackers:
            tracker.close()


def _cut_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and one that a killed run did not finish."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
