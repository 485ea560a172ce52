# SPDX-License-Identifier: Apache-2.0
"""Reading one clip's media by its locator, against a bare pyarrow read of the same row group.

    python benchmarks/read_clip.py out/corpus --json

Both open the shard each time, read ``video`` and ``frames`` of the row group that holds the clip, and have the
clip's bytes in hand at the end; clips are drawn at random, the two take turns in changing order.
"""

import argparse
import json
import random
import statistics
import time

import pyarrow.parquet as pq

from dataengine.corpus import Corpus

COLUMNS = ["video", "frames"]


def main() -> None:
    """Prints the median time of each, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    corpus = Corpus.open(options.corpus)
    rows = corpus.catalog(["clip_id", "shard", "row_group", "row"]).to_pylist()
    drawn = random.Random(0).choices(rows, k=options.clips)

    def ours(row: dict) -> bytes:
        return corpus.read_clip(row, COLUMNS)["video"]["bytes"]

    def bare(row: dict) -> bytes:
        with pq.ParquetFile(corpus.path("shards", f"{row['shard']}.parquet")) as file:
            group = file.read_row_group(row["row_group"], columns=COLUMNS)
        return group["video"][row["row"]].as_py()["bytes"]

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn, row in enumerate(drawn):
        ways = [("ours", ours), ("bare", bare)]
        found = set()
        for name, way in ways if turn % 2 else ways[::-1]:
            begun = time.perf_counter()
            found.add(way(row))
            seconds[name].append(time.perf_counter() - begun)
        assert len(found) == 1, f"{row['clip_id']} reads differently"
    own, other = (1000 * statistics.median(seconds[name]) for name in ("ours", "bare"))
    print(f"{own:.2f} ms by locator, {other:.2f} ms bare: {own / other:.2f}")
    if options.json:
        print(json.dumps({"ms": own, "bare_ms": other, "ratio_to_bare_pyarrow": own / other}))


if __name__ == "__main__":
    main()
