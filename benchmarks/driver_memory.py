# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the driver against the number of videos: it must not grow.

``python benchmarks/driver_memory.py [--sizes 50 500]`` makes short demo videos, ingests them with
the quickstart pipeline in a process of its own, and prints that process' peak resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SEED = 7  # as training/tiny_clip.sh, so that its demo videos can be used: --demo out/tiny_clip/demo


def ingest_peak_mb(videos: Path, corpus: Path, limit: int) -> float:
    """Returns the driver's peak resident memory in MiB; Ray's own processes are not in it."""
    command = ["-m", "dataengine", "ingest", "pipelines/tiny_clip.yaml"]
    command += ["--sources", str(videos), "--corpus", str(corpus), "--limit", str(limit)]
    code = (
        "import resource, runpy, sys\n"
        f"sys.argv = {['dataengine', *command[2:]]!r}\n"
        "try:\n    runpy.run_module('dataengine', run_name='__main__')\n"
        "except SystemExit as error:\n    assert not error.code, error.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    return int(answer.stdout.split()[-1]) / 1024


def main() -> None:
    """Measures every size and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--demo", type=Path, help="use and keep this folder for the demo videos")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = arguments.demo or Path(folder) / "demo"
        render = [sys.executable, "-m", "dataengine", "demo", str(demo), "--seed", str(SEED)]
        subprocess.run([*render, "--num-videos", str(max(arguments.sizes))], check=True)
        peaks = {}
        for size in arguments.sizes:
            peaks[size] = ingest_peak_mb(demo / "videos", Path(folder) / f"corpus{size}", size)
            print(f"{size:>6} videos: driver peak {peaks[size]:.0f} MiB")
    smallest, largest = min(peaks), max(peaks)
    ratio = round(peaks[largest] / peaks[smallest], 3)
    print(json.dumps({"driver_peak_mb": peaks, "ratio": ratio}))


if __name__ == "__main__":
    main()
