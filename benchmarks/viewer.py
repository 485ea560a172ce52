# SPDX-License-Identifier: Apache-2.0
"""CPU time of what the viewer asks a corpus: pages, counts, words.

    python benchmarks/viewer.py out/corpus --json

Asks the catalog as the page does, without HTTP, each question on other clips ``--repeat`` times, and prints the
median CPU seconds beside those of a DuckDB scan of two columns of the same files. ``benchmarks/query.py --folder
FOLDER`` leaves a large synthetic catalog to ask.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

from dataengine.corpus import Corpus
from dataengine.query.sql import connect
from dataengine.viewer.catalog import Catalog, Filter, Order

PAGE = 60


def main() -> None:
    """Prints the median CPU seconds of each question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    corpus = Corpus.open(options.corpus)
    everything, scored = Filter(), Filter(where="clip_score > p90")
    by_video, by_score = Order(), Order(column="clip_score", descending=True)

    def page(wanted: Filter, order: Order, *, second: bool = False) -> Callable[[], object]:
        def ask() -> object:
            # A new one each time: it remembers counts and percentiles.
            catalog = Catalog(corpus)
            with catalog.connection() as connection:
                first = catalog.page(connection, wanted, order, "", PAGE)
                if second and first["next"]:
                    return catalog.page(connection, wanted, order, first["next"], PAGE)
                return first

        return ask

    def count(wanted: Filter) -> Callable[[], object]:
        def ask() -> object:
            catalog = Catalog(corpus)
            with catalog.connection() as connection:
                return catalog.count(connection, wanted)

        return ask

    def bare() -> object:
        with connect(corpus) as db:
            return db.execute(
                "select max(clip_score), count(distinct video_id) from clips"
            ).fetchall()

    questions = {
        "bare scan of two columns": bare,
        "page by video": page(everything, by_video),
        "page by score": page(everything, by_score),
        "pages 1 and 2 by score": page(everything, by_score, second=True),
        "page of a percentile": page(scored, by_score),
        "count everything": count(everything),
    }
    seconds: dict[str, list[float]] = {name: [] for name in questions}
    for turn in range(options.repeat):
        for name in list(questions)[:: -1 if turn % 2 else 1]:
            begun = time.process_time()
            questions[name]()
            seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    scan = medians["bare scan of two columns"]
    for name, taken in medians.items():
        print(f"{name:26} {taken:8.3f} CPU s  {taken / scan:6.2f} of the scan")
    if options.json:
        print(json.dumps({"cpu_seconds": medians}))


if __name__ == "__main__":
    main()
