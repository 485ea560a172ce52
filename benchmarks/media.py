# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of the whole media path against a bare decode and against other tools.

``python benchmarks/media.py --videos DIR [--json] [--rivals pyscenedetect,video2dataset]``

- ours: `SegmentStage` and `ClipStage` in one process: probe, decode, ContentDetector, motion and
  stillness, 16 frames a clip at short side 320 as JPEG, and every clip cut out exactly.
- bare: ``ffmpeg -threads 1 -i X -f null -`` over the same files, with the ffmpeg that is shipped
  with ``imageio-ffmpeg``; and once more with the system's, where there is one.
- pyscenedetect: ``scenedetect -i X detect-content split-video`` as it comes: clips are encoded, no frame
  is sampled.
- video2dataset: its cut detection and its exact clipping, in an environment of its own:
  ``--video2dataset PATH`` names the program. It installs, at about 2 GB, with::

    uv venv v2d && export VIRTUAL_ENV=$PWD/v2d
    uv pip install torch==2.13.0 "numpy<2" "setuptools<81"
    uv pip install --no-deps video2dataset==1.3.0 torchdata==0.7.1 transformers==4.37.1 decord
    uv pip install "fire<0.6" requests ffmpeg-python yt_dlp "pyarrow<17" fsspec webdataset webvtt-py \
        wandb "pandas<2.3" tqdm timeout-decorator "scenedetect[opencv]==0.6.2" langdetect omegaconf \
        einops soundfile "huggingface_hub<1" "tokenizers<0.19" safetensors regex scipy Pillow "numpy<2"
    mkdir v2d/lib/python3.11/site-packages/torchaudio && cd $_ && touch {__init__,functional,transforms}.py

Files are taken in order of name if their short side is 360 to 720 pixels and MP4 carries their codec, so
that no clip of ours has to be encoded, and again from the first until ``--minutes`` are reached. All
tools see the same list.

A figure is user plus system time of a process and everything it started, from ``wait4``. Starting up is
taken off: for ours a run over no file, for the rivals a run that only prints the version, times the
number of processes; video2dataset starts its workers even for nothing, so a list of one missing video
is measured. ``raw`` gives the sums before that. Tools take turns, ``--repeats`` times; medians are compared.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dataengine import media
from dataengine.cut import COPIED_VIDEO
from dataengine.errors import MediaError

V2D_CONFIG = """
subsampling:
    CutDetectionSubsampler:
        cuts_are_clips: true
        args: {cut_detection_mode: all, framerates: null, threshold: 27}
    ClippingSubsampler:
        args: {min_length: 1.0, max_length: 30.0, max_length_strategy: all, precision: exact}
reading:
    yt_args: {download_size: 360, download_audio_rate: 44100, yt_metadata_args: null}
    timeout: 60
    sampler: null
storage: {number_sample_per_shard: 1000, oom_shard_count: 5, captions_are_subtitles: false}
distribution: {processes_count: 1, thread_count: 1, subjob_size: 1000, distributor: multiprocessing}
"""


def cpu_seconds(command: Sequence[str], environ: dict[str, str] | None = None) -> float:
    """Runs a command; returns user plus system time of it and of what it waited for.

    Raises:
        RuntimeError: If the command fails; its last words are in the message.
    """
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environ
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            words.seek(0)
            tail = words.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{command[0]} ended with {child.returncode}:\n{tail}")
    return usage.ru_utime + usage.ru_stime


def choose(folder: Path, minutes: float) -> tuple[list[Path], float]:
    """Returns the files to measure, some twice if there are few, and their minutes."""
    found: list[tuple[Path, float]] = []
    for path in sorted(folder.iterdir()):
        try:
            info = media.probe(str(path))
        except MediaError:
            continue
        if (
            info.video_codec in COPIED_VIDEO
            and info.has_times
            and 360 <= min(info.width, info.height) <= 720
        ):
            found.append((path, info.duration_ms / 60_000))
            print(
                f"  {path.name:40} {info.width}x{info.height} {info.video_codec:6} "
                f"{info.fps:6.2f} fps {info.duration_ms / 1000:7.1f} s"
            )
    if not found:
        raise SystemExit(f"{folder} holds no video of 360p to 720p that MP4 carries")
    chosen: list[Path] = []
    total = 0.0
    while total < minutes:
        for path, length in found:
            if total >= minutes:
                break
            chosen.append(path)
            total += length
    return chosen, total


def work(files: Sequence[str]) -> None:
    """What the process of ``ours`` does: every file through both stages; prints what came out."""
    from dataengine.models.shots import ContentSettings, build_shot_detector
    from dataengine.stage import Kept
    from dataengine.stages.clip import ClipConfig, ClipStage
    from dataengine.stages.segment import SegmentConfig, SegmentStage

    segment, clip = SegmentStage(SegmentConfig(num_frames=16)), ClipStage(ClipConfig())
    build_shot_detector(ContentSettings())  # what it imports belongs to starting up
    segment.setup()
    clip.setup()
    clips = encoded = frames = 0
    for file in files:
        video = {"video_id": "v", "source_url": file, "_video": None, "_path": file}
        (outcome,) = segment.process([video])
        if not isinstance(outcome, Kept):
            print(f"{file}: {outcome}", file=sys.stderr)
            continue
        rows = [video | dict(row) for row in outcome.rows if "_drop" not in row]
        for made in clip.process(rows):
            assert isinstance(made, Kept), made
            (row,) = made.rows
            clips += 1
            encoded += row["provenance"][0]["model"] != "ffmpeg/copy"
        frames += sum(len(row["frames"]) for row in rows)
    print(json.dumps({"clips": clips, "encoded": encoded, "frames": frames}))


def run_ours(files: Sequence[Path]) -> float:
    """Returns CPU seconds of both stages over all files, in one process."""
    return cpu_seconds([sys.executable, __file__, "--work", *map(str, files)])


def run_bare(ffmpeg: str, files: Sequence[Path]) -> float:
    """Returns CPU seconds of ffmpeg decoding each file's first video stream, and nothing else."""
    start = ["-nostdin", "-v", "error", "-threads", "1"]
    return sum(
        cpu_seconds([ffmpeg, *start, "-i", str(file), "-map", "0:v:0", "-f", "null", "-"])
        for file in files
    )


def run_pyscenedetect(program: str, ffmpeg: str, files: Sequence[Path]) -> float:
    """Returns CPU seconds of detecting and splitting, with our ffmpeg in its path."""
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ffmpeg, Path(folder) / "ffmpeg")
        environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
        for file in files:
            with tempfile.TemporaryDirectory() as out:
                command = [program, "-q", "-i", str(file), "-o", out, "detect-content"]
                total += cpu_seconds([*command, "split-video"], environ)
    return total


def run_video2dataset(program: str, ffmpeg: str, files: Sequence[Path]) -> float:
    """Returns CPU seconds of cut detection and exact clipping over all files, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ffmpeg, Path(folder) / "ffmpeg")
        environ = os.environ | {
            "PATH": f"{folder}:{Path(program).parent}:{os.environ['PATH']}",
            "WANDB_MODE": "disabled",
        }
        listed = Path(folder) / "list.csv"
        # It wants names that end in .mp4, whatever is inside.
        lines = ["url,caption", f"{folder}/missing.mp4,x"]
        for index, file in enumerate(files):
            link = Path(folder) / f"{index}.mp4"
            os.symlink(file.absolute(), link)
            lines.append(f"{link},x")
        listed.write_text("\n".join(lines) + "\n")
        config = Path(folder) / "config.yaml"
        config.write_text(V2D_CONFIG)
        out = Path(folder) / "out"
        command = [program, "--url_list", str(listed), "--input_format", "csv", "--url_col", "url"]
        command += ["--caption_col", "caption", "--output_folder", str(out)]
        command += ["--output_format", "webdataset", "--config", str(config)]
        seconds = cpu_seconds(command, environ)
        made = sum(len(names(tar)) for tar in out.glob("*.tar"))
        print(f"  video2dataset made {made} clips", flush=True)
    return seconds


def names(tar: Path) -> list[str]:
    """Returns the videos in an archive."""
    import tarfile

    with tarfile.open(tar) as archive:
        return [name for name in archive.getnames() if name.endswith(".mp4")]


def main() -> None:
    """Measures, and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of videos")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", default="", help="pyscenedetect,video2dataset")
    parser.add_argument("--rival-repeats", type=int, default=1)
    parser.add_argument("--scenedetect", help="its program; else the one beside this Python")
    parser.add_argument("--video2dataset", help="its program")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    if not arguments.videos:
        parser.error("--videos DIR is needed")
    keep = sys.stdout
    if arguments.json:
        sys.stdout = sys.stderr
    import imageio_ffmpeg

    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    files, minutes = choose(arguments.videos, arguments.minutes)
    print(f"{len(files)} runs of files, {minutes:.1f} minutes", flush=True)
    beside = Path(sys.executable).with_name("scenedetect")
    scenedetect = arguments.scenedetect or str(beside)
    # Name -> (how often, what is measured, what of it is starting up).
    tools: dict[str, tuple[int, Callable[[], float], Callable[[], float]]] = {
        "ours": (arguments.repeats, lambda: run_ours(files), lambda: run_ours([])),
        "bare": (
            arguments.repeats,
            lambda: run_bare(ffmpeg, files),
            lambda: len(files) * cpu_seconds([ffmpeg, "-version"]),
        ),
    }
    if system := shutil.which("ffmpeg"):
        tools["bare_system"] = (
            arguments.repeats,
            lambda: run_bare(system, files),
            lambda: len(files) * cpu_seconds([system, "-version"]),
        )
    rivals = [name for name in arguments.rivals.split(",") if name]
    for name in rivals:
        match name:
            case "pyscenedetect":
                tools[name] = (
                    arguments.rival_repeats,
                    lambda: run_pyscenedetect(scenedetect, ffmpeg, files),
                    lambda: len(files) * cpu_seconds([scenedetect, "version"]),
                )
            case "video2dataset":
                if not arguments.video2dataset:
                    parser.error("--video2dataset PROGRAM is needed")
                tools[name] = (
                    arguments.rival_repeats,
                    lambda: run_video2dataset(arguments.video2dataset, ffmpeg, files),
                    lambda: run_video2dataset(arguments.video2dataset, ffmpeg, []),
                )
            case _:
                parser.error(f"no rival is called {name}")
    raw: dict[str, list[float]] = {name: [] for name in tools}
    start: dict[str, list[float]] = {name: [] for name in tools}
    for turn in range(max(times for times, _, _ in tools.values())):
        for name, (times, measured, starting) in tools.items():
            if turn < times:
                start[name].append(starting())
                raw[name].append(measured())
                print(f"  {name:14} {raw[name][-1]:8.2f} CPU s", flush=True)
    net = {n: statistics.median(raw[n]) - statistics.median(start[n]) for n in tools}
    print(f"{'':14} {'raw':>8} {'start':>8} {'net':>8} {'s/min':>8}")
    for name in tools:
        a, b = statistics.median(raw[name]), statistics.median(start[name])
        print(f"{name:14} {a:8.2f} {b:8.2f} {net[name]:8.2f} {net[name] / minutes:8.2f}")
    result = {
        "minutes": round(minutes, 2),
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "cpu_seconds": {n: round(s, 2) for n, s in net.items()},
        "raw": {n: [round(s, 2) for s in seconds] for n, seconds in raw.items()},
        "start": {n: [round(s, 2) for s in seconds] for n, seconds in start.items()},
        "cpu_ratio_to_bare_decode": round(net["ours"] / net["bare"], 3),
    }
    if "pyscenedetect" in net:
        result["cpu_ratio_to_pyscenedetect_split"] = round(net["ours"] / net["pyscenedetect"], 3)
    if "video2dataset" in net:
        result["cpu_ratio_to_video2dataset"] = round(net["ours"] / net["video2dataset"], 3)
    print(json.dumps(result), file=keep)


if __name__ == "__main__":
    main()
