# SPDX-License-Identifier: Apache-2.0
"""What becomes of 500 URLs, a tenth of them with each fault, through `dataengine ingest` and `retry`.

``python benchmarks/downloads.py [--num-urls 500]`` serves them from this machine as four hosts, half
of them as files and half as pages that yt-dlp reads. After the first run the hosts recover, and
``retry`` works on what failed. Prints one JSON line: how many ended in another class than their own,
the most requests a host saw at a time and the shortest pause it was given, beside the limits set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dataengine.corpus import Corpus  # noqa: E402
from tests.fault_server import FaultServer  # noqa: E402
from tests.media_factory import make_video  # noqa: E402

KINDS = {
    # What the server does: how the URL ends at first, and after the hosts have recovered.
    "ok": (None, None),
    "moved": (None, None),
    "missing": ("http_4xx", "http_4xx"),
    "text": ("not_a_video", "not_a_video"),
    "large": ("too_large", "too_large"),
    "hangs-up": ("connection_failed", "connection_failed"),
    "full": ("http_429", None),
    "broken": ("http_5xx", None),
    "cut": ("incomplete", None),
    "stall": ("timeout", None),
}
HOSTS = tuple(f"127.0.0.{n}" for n in range(1, 5))
CONCURRENCY, PAUSE_S = 2, 0.05
WINDOW = 20
"""Requests in a row over which pauses are averaged; see `FaultServer.least_pause_s`."""

PIPELINE = f"""
name: downloads
shards: {{shard_mb: 1}}
stages:
  download:
    resources: {{num_cpus: 0.1, min_actors: 8, max_actors: 8}}
    allow_private: true
    max_file_mb: 1
    retries: 1
    backoff_s: 0.1
    timeout_s: 3
    fetch_timeout_s: 120
    per_host_concurrency: {CONCURRENCY}
    sleep_interval_s: {PAUSE_S}
  segment: {{resources: {{num_cpus: 0.5}}, min_clip_ms: 100, num_frames: 1}}
  clip: {{resources: {{num_cpus: 0.5, colocate: true}}}}
"""


@dataclass(frozen=True)
class Result:
    """How both runs ended.

    Attributes:
        first: Ledger rows after the first run, by source.
        second: The same after the retry.
        kinds: Source -> key of KINDS.
        num_late_requests: Requests of sources that were not to be tried again, during the retry.
        server: With its log.
        seconds: Wall time of both runs.
    """

    first: dict[str, dict]
    second: dict[str, dict]
    kinds: dict[str, str]
    num_late_requests: int
    server: FaultServer
    seconds: tuple[float, float]

    def wrong(self) -> list[str]:
        """Returns the sources that ended in another way than their kind says."""
        ends = ((self.first, 0), (self.second, 1))
        return [
            f"{source}: {rows.get(source, {}).get('reason')} in run {run + 1}"
            for rows, run in ends
            for source, kind in self.kinds.items()
            if source not in rows or rows[source]["reason"] != KINDS[kind][run]
        ]


def run(folder: Path, num_urls: int) -> Result:
    """Ingests, lets the hosts recover, and retries."""
    video = make_video(folder / "a.mp4", shot_frames=(10,), size=(64, 64)).read_bytes()
    server = FaultServer(video)
    kinds = {}
    for n in range(num_urls):
        # Every kind as a file and as a page, at every host.
        kind, form, host = list(KINDS)[n % 10], (n // 10) % 2, HOSTS[(n // 20) % 4]
        path = f"{kind}/{n}.mp4" if form == 0 else f"watch/{kind}/{n}"
        kinds[server.url(path, host)] = kind
    (folder / "list.txt").write_text("\n".join(kinds))
    (folder / "downloads.yaml").write_text(PIPELINE)
    corpus = str(folder / "corpus")
    start = time.monotonic()
    _dataengine(
        "ingest", str(folder / "downloads.yaml"), "-s", str(folder / "list.txt"), "-c", corpus
    )
    middle = time.monotonic()
    first = _ledger(corpus)
    server.mended = True
    asked = len(server.hits)
    _dataengine("retry", corpus, "--class", "http_429,http_5xx,incomplete,timeout")
    end = time.monotonic()
    mended = {kind for kind, (before, after) in KINDS.items() if before and not after}
    late = sum(
        not (mended & set(hit.path.split("/")) or hit.path.startswith("/subtitles/"))
        for hit in server.hits[asked:]
    )
    server.close()
    return Result(first, _ledger(corpus), kinds, late, server, (middle - start, end - middle))


def _dataengine(*arguments: str) -> None:
    command = [sys.executable, "-m", "dataengine", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def _ledger(corpus: str) -> dict[str, dict]:
    return {row["source"]: row for row in Corpus.open(corpus).videos().to_pylist()}


def main() -> None:
    """Runs it and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-urls", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), arguments.num_urls)
    for name, rows in (("ingest", result.first), ("retry", result.second)):
        counts = Counter(row["reason"] or "kept" for row in rows.values())
        print(f"after {name}: {dict(sorted(counts.items()))}")
    for line in result.wrong():
        print("wrong:", line)
    print(
        json.dumps(
            {
                "urls": len(result.kinds),
                "wrong_class": len(result.wrong()),
                "requests": len(result.server.hits),
                "most_at_a_time_per_host": max(result.server.most_at_work().values()),
                "limit_at_a_time": CONCURRENCY,
                "shortest_pause_s": round(min(result.server.least_pause_s(WINDOW).values()), 3),
                "limit_pause_s": PAUSE_S,
                "needless_requests_in_retry": result.num_late_requests,
                "seconds": [round(each, 1) for each in result.seconds],
            }
        )
    )


if __name__ == "__main__":
    main()
