# SPDX-License-Identifier: Apache-2.0
"""CPU time of the training loader per clip, against video decoders and WebDataset; time to resume.

``python benchmarks/loader.py [--json] [--clips 48] [--resume]``

A clip is 10 s long, of moving texture, things that cross it, a cut and grain, encoded as web video is (x264,
medium, CRF 23, a key frame every 250). What is measured, one thread, in this process, data in memory (page
cache), is the CPU time from stored bytes to 8 frames of 224 x 224:

- ours: the training loader on a corpus of these clips: frames as the ingest pipelines store them (8
  JPEGs of quality 90, short side 320), a random crop per clip, tokens, batches. ``crop_on=reader``, the
  default; with ``device`` readers make whole squares of 256 x 256.
- decoders: PyAV, torchcodec and decord, as far as they can be imported, reading 8 even frames from the MP4s,
  each in its fastest way that shows the right frames: PyAV decodes up to the last one and converts only
  those asked for, torchcodec and decord seek, resizing themselves. Nothing else: no crop, no tokens.
  (``pip install torchcodec``; ``pip install decord``.)
- webdataset: the same JPEGs and captions in a tar, read as its users do: ``decode("pil")``, random
  crops by Pillow's bicubic resize, the same tokens, ``batched``. And once more with our JPEG decoder in its map,
  which tells the format's part from the decoder's.

All take turns, ``--repeats`` times; medians are compared. ``--resume`` also builds a corpus of 10M clips
(synthetic catalog; its shards are one file under many names) and measures how long a run that stopped in the
middle of an epoch takes to its first batch of 64 again, in a new process, the libraries loaded.
"""

import argparse
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dataengine import records
from dataengine.corpus import Corpus, writer_options

FRAMES, SIZE, SECONDS, FPS, BATCH = 8, 224, 10, 30, 8
SOURCES = 3
"""Different videos; clips beyond are copies, in files of their own."""
SIZES = {"720p": (1280, 720), "320p": (568, 320)}
SHARES = (np.arange(FRAMES) + 0.5) / FRAMES
BIG_SHARDS, BIG_ROWS = 1000, 10_000


# -------------------------------------------------------------------------------------------- data


def encode(path: Path, seed: int) -> None:
    """Writes a 720p clip: a pan over texture, discs that cross it, a cut in the middle, grain."""
    import imageio_ffmpeg

    width, height = SIZES["720p"]
    rng = np.random.default_rng(seed)
    scenes = [texture(rng, width + 640, height + 320) for _ in range(2)]
    grain = rng.normal(0, 3.0, (height + 64, width + 64, 1))
    grain = np.round(grain).astype(np.int16)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    discs = rng.uniform(0, 1, (4, 6))
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", str(FPS), "-i", "-", *X264, str(path),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE) as ffmpeg:
        assert ffmpeg.stdin is not None
        for number in range(SECONDS * FPS):
            share = number / (SECONDS * FPS)
            left, top = int(600 * share), int(150 * (1 + np.sin(6 * share)))
            frame = scenes[number * 2 // (SECONDS * FPS)][top : top + height, left : left + width]
            frame = frame.astype(np.int16)
            for cx, cy, vx, vy, r, shade in discs:
                at_x = (cx + (vx - 0.5) * 2 * share) % 1 * width
                at_y = (cy + (vy - 0.5) * 2 * share) % 1 * height
                inside = (x - at_x) ** 2 + (y - at_y) ** 2 < (60 + 100 * r) ** 2
                frame[inside] = frame[inside] // 3 + int(170 * shade)
            dx, dy = rng.integers(0, 64, 2)
            frame += grain[dy : dy + height, dx : dx + width]
            ffmpeg.stdin.write(np.clip(frame, 0, 255).astype(np.uint8).tobytes())
    if ffmpeg.returncode:
        raise SystemExit("ffmpeg could not encode")


X264 = ["-c:v", "libx264", "-preset", "medium", "-crf", "23", "-g", "250", "-pix_fmt", "yuv420p"]


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns uint8 RGB with details of all sizes, the coarse ones strongest, as photographs have."""
    import cv2

    total = np.zeros((height, width, 3), np.float32)
    cell = 512
    while cell >= 2:
        grid = rng.normal(0, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * cell**0.6
        cell //= 2
    total = (total - total.mean()) / total.std()
    return np.clip(127 + 55 * total, 0, 255).astype(np.uint8)


def make_videos(folder: Path, num_clips: int) -> dict[str, list[Path]]:
    """Writes the MP4s of both sizes; returns their paths."""
    import imageio_ffmpeg

    for number in range(SOURCES):
        large, small = (folder / f"{size}_{number}.mp4" for size in SIZES)
        if not small.exists():
            encode(large, number)
            width, height = SIZES["320p"]
            command = [
                imageio_ffmpeg.get_ffmpeg_exe(),
                "-y",
                "-loglevel",
                "error",
                "-i",
                str(large),
            ]
            command += ["-vf", f"scale={width}:{height}", *X264, str(small)]
            subprocess.run(command, check=True)
    paths: dict[str, list[Path]] = {}
    for size in SIZES:
        (folder / size).mkdir(exist_ok=True)
        paths[size] = [folder / size / f"{number:06d}.mp4" for number in range(num_clips)]
        for number, path in enumerate(paths[size]):
            if not path.exists():
                shutil.copy(folder / f"{size}_{number % SOURCES}.mp4", path)
    return paths


def stored_frames(mp4: Path) -> list[bytes]:
    """Returns a clip's frames as `SegmentStage` stores them."""
    from dataengine import media
    from dataengine.stages.segment import SegmentConfig
    from training.data.video import decode_frames

    defaults = SegmentConfig()
    assert defaults.num_frames == FRAMES
    jpegs = []
    for image in decode_frames(mp4.read_bytes(), SHARES.tolist()):
        size = media.scaled_size(*image.size, defaults.frame_short_side)
        jpegs.append(media.jpeg_encode(np.asarray(image.resize(size)), defaults.jpeg_quality))
    return jpegs


WORDS = """a man woman dog child red blue old car street runs walks slowly past the house near water
while someone plays music under trees and people watch from behind yellow glass at night"""


def caption(number: int) -> str:
    """Returns twenty words."""
    words = WORDS.split()
    return " ".join(np.random.default_rng(number).choice(words, 20))


def write_corpus(folder: Path, jpegs: list[list[bytes]], mp4s: list[Path]) -> None:
    """Writes a corpus with the project's own writer: MP4s and frames, several shards."""
    corpus = Corpus.create(str(folder))
    corpus.take_over("benchmark")
    rows = []
    for number, (frames, mp4) in enumerate(zip(jpegs, mp4s, strict=True)):
        video = f"video-{number:06d}"
        row = dict.fromkeys(records.CLIP_SCHEMA.names)
        row |= {"clip_id": records.clip_id(video, 0, 10_000), "video_id": video, "start_ms": 0}
        row |= {"end_ms": 10_000, "duration_ms": 10_000, "caption": caption(number)}
        row |= {"frames": frames, "video": {"bytes": mp4.read_bytes(), "path": mp4.name}}
        rows.append(row)
    for start in range(0, len(rows), 16):
        clips = pa.Table.from_pylist(rows[start : start + 16], schema=records.CLIP_SCHEMA)
        ledger = [
            dict.fromkeys(records.VIDEO_SCHEMA.names)
            | {"source": row["video_id"], "video_id": row["video_id"], "status": records.KEPT}
            | {"num_clips": 1, "dropped_clips": []}
            for row in clips.select(["video_id"]).to_pylist()
        ]
        corpus.commit(clips, ledger, run_id="benchmark", fingerprint="benchmark")


def write_tar(path: Path, jpegs: list[list[bytes]]) -> None:
    """Writes the JPEGs and captions as a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for number, frames in enumerate(jpegs):
            files = {f"{i}.jpg": jpeg for i, jpeg in enumerate(frames)}
            for name, data in {**files, "txt": caption(number).encode()}.items():
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


# ------------------------------------------------------------------------------------- contestants


def our_loader(corpus: Path, crop_on: str) -> Callable[[], int]:
    """Returns a function that reads an epoch with the training loader and counts the clips."""
    from training.config import load_recipe
    from training.data.corpora import open_corpora

    recipe = load_recipe(
        "viclip_b",
        [
            f"data.sources=[{{data: {corpus}}}]", f"data.batch_size={BATCH}", "data.held_out=0",
            "data.num_workers=0", "data.slots=1", "data.lanes=1", f"data.crop_on={crop_on}",
        ],
    )  # fmt: skip
    corpora = open_corpora(recipe)

    def epoch() -> int:
        # A new one each time: it has read nothing yet.
        loader = corpora.train_loader()
        batches = iter(loader)
        num = 0
        for _ in range(loader.steps_per_epoch):
            batch = next(batches)
            assert batch.frames is not None
            assert batch.valid.all()
            num += len(batch.frames)
        return num

    return epoch


def webdataset_epoch(tar: Path, own_decoder: bool) -> Callable[[], int]:
    """Returns a function that reads the tar once through WebDataset."""
    import webdataset
    from PIL import Image

    from dataengine.networks.text import clean_caption, tokenise
    from training.data.transforms import decode_jpegs, random_crop

    names = [f"{number}.jpg" for number in range(FRAMES)]
    rng = np.random.default_rng(0)

    def pil_frames(sample: dict[str, Any]) -> dict[str, Any]:
        first = sample[names[0]]
        crop = random_crop(first.width, first.height, (0.5, 1.0), True, rng)
        box = (
            crop.left * first.width, crop.top * first.height,
            crop.right * first.width, crop.bottom * first.height,
        )  # fmt: skip
        frames = []
        for name in names:
            image = sample[name].resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
            if crop.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            frames.append(np.asarray(image))
        return {"frames": torch.from_numpy(np.stack(frames)), "tokens": tokens(sample["txt"])}

    def own_frames(sample: dict[str, Any]) -> dict[str, Any]:
        crop = random_crop(1, 1, (0.5, 1.0), True, rng)
        frames = decode_jpegs([sample[name] for name in names], SIZE, crop)
        text = sample["txt"].decode()
        return {"frames": torch.from_numpy(frames), "tokens": tokens(text)}

    def tokens(text: str) -> torch.Tensor:
        return tokenise([clean_caption(text)], 32)[0]

    def epoch() -> int:
        library: Any = webdataset
        dataset = library.WebDataset(str(tar), shardshuffle=False).shuffle(100)
        dataset = dataset.map(own_frames) if own_decoder else dataset.decode("pil").map(pil_frames)
        num = 0
        for batch in dataset.batched(BATCH):
            assert batch["frames"].shape[1:] == (FRAMES, SIZE, SIZE, 3)
            num += len(batch["frames"])
        return num

    return epoch


def pyav_frames(path: Path) -> np.ndarray:
    """One pass up to the last frame; only those asked for are converted and scaled."""
    import av

    wanted = [int(share * SECONDS * FPS) for share in SHARES]
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number == wanted[len(frames)]:
                frames.append(frame.to_ndarray(width=SIZE, height=SIZE, format="rgb24"))
                if len(frames) == FRAMES:
                    break
    return np.stack(frames)


def torchcodec_frames(path: Path, mode: str) -> np.ndarray:
    """Frames by number; scaled by the decoder."""
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    from torchcodec.transforms import Resize  # pyright: ignore[reportMissingImports]

    decoder = VideoDecoder(
        str(path), seek_mode=mode, num_ffmpeg_threads=1, dimension_order="NHWC",
        transforms=[Resize((SIZE, SIZE))],
    )  # fmt: skip
    wanted = [int(share * SECONDS * FPS) for share in SHARES]
    return decoder.get_frames_at(wanted).data.numpy()


def decord_frames(path: Path) -> np.ndarray:
    """Frames by number; scaled by the decoder."""
    import decord  # pyright: ignore[reportMissingImports]

    reader = decord.VideoReader(str(path), num_threads=1, width=SIZE, height=SIZE)
    return reader.get_batch([int(share * SECONDS * FPS) for share in SHARES]).asnumpy()


def decoders() -> dict[str, Callable[[Path], np.ndarray]]:
    """Returns the decoders that can be imported; prints those that cannot."""
    found: dict[str, Callable[[Path], np.ndarray]] = {}
    for name, read in {
        "pyav": pyav_frames,
        "torchcodec exact": lambda path: torchcodec_frames(path, "exact"),
        "torchcodec approximate": lambda path: torchcodec_frames(path, "approximate"),
        "decord": decord_frames,
    }.items():
        package = {"pyav": "av"}.get(name, name.split()[0])
        if importlib.util.find_spec(package):
            found[name] = read
        else:
            print(f"{name}: not installed, left out")
    return found


# --------------------------------------------------------------------------------------- measuring


def measure(
    ways: dict[str, Callable[[], int]], repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Returns CPU ms per clip of each, median, least and most; they take turns in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            begun = time.process_time()
            num = ways[name]()
            if turn:  # the first time libraries are loaded
                seconds[name].append((time.process_time() - begun) / num)
    return {
        name: (1000 * statistics.median(all_), 1000 * min(all_), 1000 * max(all_))
        for name, all_ in seconds.items()
    }


def over(paths: list[Path], read: Callable[[Path], np.ndarray]) -> Callable[[], int]:
    """Returns a function that reads all files and counts them."""

    def epoch() -> int:
        for path in paths:
            assert read(path).shape == (FRAMES, SIZE, SIZE, 3)
        return len(paths)

    return epoch


def check_same(path: Path, ways: dict[str, Callable[[Path], np.ndarray]]) -> None:
    """Raises unless all decoders show the same frames, but for how they convert and scale."""
    expected = pyav_frames(path).astype(np.int16)
    for name, read in ways.items():
        off = np.abs(read(path) - expected).mean()
        # The next frame of the moving texture is off by more than 15.
        if off > 8:
            raise SystemExit(f"{name} shows other frames: {off:.1f} of 255 off on average")


def profile(epoch: Callable[[], int]) -> None:
    """Prints where an epoch of the loader spends its time, by function."""
    import cProfile
    import pstats

    profiler = cProfile.Profile(time.process_time)
    num = profiler.runcall(epoch)
    stats: Any = pstats.Stats(profiler)
    print(f"\nours, ms per clip by function itself ({num} clips, with the profiler's own cost)")
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:12]
    for (file, _, function), (_, calls, own, _, _) in rows:
        where = f"{Path(file).name}:{function}" if file != "~" else function
        print(f"  {1000 * own / num:7.3f}  {calls / num:6.1f} calls  {where}")


def seconds_to_resume(folder: Path) -> tuple[float, float]:
    """Builds the large corpus if it is not there; returns wall and CPU time of the restart."""
    if not (folder / "corpus.json").exists():
        build_large(folder)
    words = [sys.executable, __file__, "--restart", str(folder)]
    shutil.rmtree(index_of(folder), ignore_errors=True)
    total = cpu = 0.0
    for turn in ("first opening, the index is built", "resuming, the index is kept"):
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        opened, total, cpu = (float(word) for word in out.split()[-3:])
        print(f"10M clips, {turn}: {total:.1f} s, {opened:.1f} of them to open; {cpu:.1f} s of CPU")
    return total, cpu


def index_of(folder: Path) -> Path:
    """Returns where the large corpus' index is kept."""
    return folder.with_name(f"{folder.name}-index")


def restart(folder: Path) -> None:
    """What a run does that goes on in the middle of an epoch; prints seconds to open and in all."""
    import open_clip  # noqa: F401  the libraries that a training process has loaded by then
    import torchvision.io  # noqa: F401

    from training.config import load_recipe
    from training.data.corpora import open_corpora

    torch.set_num_threads(1)
    settings = [f"data.sources=[{{data: {folder}}}]", "data.num_workers=0", "data.batch_size=64"]
    recipe = load_recipe("viclip_b", settings)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    corpora = open_corpora(recipe, index_of(folder))
    opened = time.perf_counter() - begun
    loader = corpora.train_loader()
    state = loader.state_dict()
    state["epoch"], state["step"] = 3, loader.steps_per_epoch // 2
    loader.load_state_dict(json.loads(json.dumps(state)))
    batch = next(iter(loader))
    assert batch.valid.all()
    print(opened, time.perf_counter() - begun, time.process_time() - begun_cpu)


def build_large(folder: Path) -> None:
    """Writes a catalog of 10M clips; all shards are one file of tiny frames."""
    from PIL import Image

    corpus = Corpus.create(str(folder))
    rng = np.random.default_rng(0)
    pool = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        pool.append(file.getvalue())
    number = np.arange(BIG_ROWS)
    captions = [caption(i) for i in range(BIG_ROWS)]

    def table(shard: str, schema: pa.Schema) -> pa.Table:
        videos = [f"v{shard}{v:06d}" for v in (number // 12).tolist()]
        start = number % 12 * 10_000
        columns: dict[str, Any] = {
            "video_id": videos,
            "clip_id": [f"{v}_{s}_{s + 10_000}" for v, s in zip(videos, start.tolist(), strict=True)],
            "start_ms": start, "end_ms": start + 10_000, "caption": captions,
            "shard": [shard] * BIG_ROWS, "row_group": number // 64, "row": number % 64,
        }  # fmt: skip
        if "frames" in schema.names:
            columns["frames"] = [[pool[(i + j) % 64] for j in range(FRAMES)] for i in number]
        arrays = [
            pa.array(columns[field.name]).cast(field.type)
            if field.name in columns
            else pa.nulls(BIG_ROWS, field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    template = folder / "template.parquet"
    schema = records.CLIP_SCHEMA
    pq.write_table(table("0", schema), template, row_group_size=64, **writer_options(schema))
    for shard in (f"{i:016x}" for i in range(BIG_SHARDS)):
        os.link(template, folder / "shards" / f"{shard}.parquet")
        catalog = table(shard, records.CATALOG_SCHEMA)
        pq.write_table(catalog, corpus.path("catalog", f"{shard}.parquet"), compression="zstd")


def prepare(folder: Path, num_clips: int) -> tuple[dict[str, list[Path]], Path, Path]:
    """Makes what is not there yet; returns the MP4s, the corpus and the tar."""
    paths = make_videos(folder, num_clips)
    corpus, tar = folder / f"corpus-{num_clips}", folder / f"frames-{num_clips}.tar"
    if not tar.exists():
        unlike = [stored_frames(path) for path in paths["720p"][:SOURCES]]
        jpegs = [unlike[number % SOURCES] for number in range(num_clips)]
        write_corpus(corpus, jpegs, paths["320p"])
        write_tar(tar, jpegs)
    return paths, corpus, tar


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures everything; prints tables and returns the figures."""
    paths, corpus, tar = prepare(folder, options.clips)
    found = decoders()
    ours = our_loader(corpus, "reader")
    ways: dict[str, Callable[[], int]] = {
        "ours": ours,
        "ours, crop_on=device": our_loader(corpus, "device"),
        "webdataset": webdataset_epoch(tar, own_decoder=False),
        "webdataset, our decoder": webdataset_epoch(tar, own_decoder=True),
    }
    for size in SIZES:
        check_same(paths[size][0], found)
        some = paths[size][: max(options.clips // 8, 2)]
        ways |= {f"{name}, {size}": over(some, read) for name, read in found.items()}
    ms = measure(ways, options.repeats)
    print(f"\n{'CPU ms per clip':34} {'median':>8} {'least':>8} {'most':>8} {'clips/s/core':>13}")
    for name, (median, least, most) in ms.items():
        print(f"{name:34} {median:8.2f} {least:8.2f} {most:8.2f} {1000 / median:13.1f}")
    own = ms["ours"][0]
    best = {size: min((ms[f"{name}, {size}"][0], name) for name in found) for size in SIZES}
    for size, (median, name) in best.items():
        print(f"best decoder at {size}: {name}, {median / own:.1f} times the CPU time of ours")
    for name in ("webdataset", "webdataset, our decoder"):
        print(f"{name}: {ms[name][0] / own:.2f} times")
    if options.profile:
        profile(ours)
    resumed = resumed_cpu = None
    if options.resume:
        resumed, resumed_cpu = seconds_to_resume(options.big or folder / "big")
    return {
        "ratio_to_best_video_decoder": best["720p"][0] / own,
        "ratio_to_best_video_decoder_320p": best["320p"][0] / own,
        "ratio_to_webdataset": ms["webdataset"][0] / own,
        "ratio_to_webdataset_with_our_decoder": ms["webdataset, our decoder"][0] / own,
        "seconds_to_resume": resumed,
        "cpu_seconds_to_resume": resumed_cpu,
        "best_video_decoder": best["720p"][1],
        "clips_per_second_per_core": 1000 / own,
        "cpu_ms_per_clip": {name: median for name, (median, _, _) in ms.items()},
    }


def folders(options: argparse.Namespace) -> Iterator[Path]:
    """Yields the folder for the data, which is removed again unless it was named."""
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        yield options.folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def main() -> None:
    """Prints the tables, and with ``--json`` the figures as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=48, help="clips in the corpus and the tar")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="also resume on 10M clips")
    parser.add_argument("--profile", action="store_true", help="where the loader's time goes")
    parser.add_argument("--folder", type=Path, help="keeps the data here, and finds it again")
    parser.add_argument("--big", type=Path, help="keeps the 10M clips here, and finds them again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--restart", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.restart:
        restart(options.restart)
        return
    for folder in folders(options):
        figures = run(options, folder)
        if options.json:
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
