# SPDX-License-Identifier: Apache-2.0
"""CPU time of the exports of a corpus, against bare loops of pyarrow and tarfile over the same shards.

    python benchmarks/export.py out/corpus --json

Every way runs in a process of its own, into a folder that is removed again; the ways take turns, and the
median of ``--repeat`` rounds counts. The start of a process is part of it (about 1.5 s): take a corpus of
thousands of clips. CPU seconds, because wall times here say more about a disk. The bare loops
read ``video`` and the captions by row group and write them, and do no more.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FORMATS = {
    "webdataset": (),
    "huggingface": (),
    "generation": ("--min-aesthetic", "0", "--min-seconds", "0"),
    "internvid": (),
    "interleaved": (),
}
"""Format -> options that let every clip through."""


def bare_tar(corpus: str, out: Path) -> None:
    """Writes every clip's video and caption into one tar."""
    import io
    import tarfile

    out.mkdir()
    with tarfile.open(out / "000000.tar", "w") as tar:
        for row in _rows(corpus):
            for suffix, data in (("mp4", row["video"]["bytes"]), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{row['clip_id']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def bare_parquet(corpus: str, out: Path) -> None:
    """Writes every row group again, as it is."""
    import pyarrow.parquet as pq

    out.mkdir()
    for path in sorted(Path(corpus, "shards").glob("*.parquet")):
        with (
            pq.ParquetFile(path) as file,
            pq.ParquetWriter(out / path.name, file.schema_arrow, compression="none") as writer,
        ):
            for number in range(file.num_row_groups):
                writer.write_table(file.read_row_group(number))


def _rows(corpus: str):  # noqa: ANN202  rows of Arrow
    import pyarrow.parquet as pq

    for path in sorted(Path(corpus, "shards").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield from file.read_row_group(
                    number, columns=["clip_id", "caption", "video"]
                ).to_pylist()


BARE = {"bare tarfile": bare_tar, "bare parquet": bare_parquet}


def cpu_seconds(command: list[str]) -> float:
    """Runs a command and returns the CPU seconds of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints clips per CPU second of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=list(BARE), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        BARE[options.part](options.corpus, options.out)
        return
    from dataengine.corpus import Corpus

    num_clips = len(Corpus.open(options.corpus).catalog(["clip_id"]))
    seconds: dict[str, list[float]] = {name: [] for name in (*BARE, *FORMATS)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        for turn in range(options.repeat):
            for name in list(seconds)[:: -1 if turn % 2 else 1]:
                if name in BARE:
                    command = [sys.executable, __file__, options.corpus]
                    command += ["--part", name, "--out", str(out)]
                else:
                    command = [sys.executable, "-m", "dataengine", "export", options.corpus]
                    command += [name, str(out), *FORMATS[name]]
                seconds[name].append(cpu_seconds(command))
                if out.is_dir():
                    shutil.rmtree(out)
                else:
                    out.unlink()
    rates = {name: num_clips / statistics.median(taken) for name, taken in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:14} {rate:10.0f} clips / CPU s")
    ratio = rates["webdataset"] / rates["bare tarfile"]
    print(
        f"webdataset: {ratio:.2f} of a bare tarfile loop, start of the process and imports included"
    )
    if options.json:
        print(json.dumps({"clips_per_cpu_s": rates, "ratio_to_bare_tarfile": ratio}))


if __name__ == "__main__":
    main()
