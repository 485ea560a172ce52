# SPDX-License-Identifier: Apache-2.0
"""What a model loses by running in a stage: throughput of the stage over that of a bare loop.

``python benchmarks/stage_overhead.py [--part caption|clip|whisper|all] [--clips N] [--rounds R] [--json]``

The stage is run as the runner runs it: an Arrow table of clips in, `dataengine.flow.apply_stage` over
batches of ``resources.batch_size`` rows, an Arrow table with the new columns out; only Ray's own messages
are left out. The bare loop has the same weights, inputs, batch size of the model and settings, is one
function, and does what every loop over the model must do and nothing of ours:

caption  JPEG to RGB by OpenCV, the processor, ``generate``, ``batch_decode``, for batches over the pictures
         of all clips (BLIP, random, 34 M parameters; 8 frames of 568x320 a clip; 20 tokens, greedy).
clip     JPEG to RGB by OpenCV and open_clip's own preprocessing in as many threads as the stage has,
         ``encode_image``, ``encode_text``, the cosines (ViT-S/32 at 224 px, 63 M parameters; 4 even frames,
         and the one that is drawn, which the loop is told).
whisper  the clips' waveforms by `dataengine.stages.caption_audio.clip_waveform` in as many threads as the
         stage has, ``whisper.log_mel_spectrogram`` of 30 s, ``whisper.decode`` over the stacked spectra,
         language detected (``tiny``, 39 M parameters; clips of 10 s that are spoken from end to end; 48
         tokens a clip, about as many as are said in 10 s).

So whatever else the stage does counts against it: rows out of and into Arrow, choosing frames, judging
captions, voice detection, windows, guards, hashes, provenance. The weights are random, made on the spot in
each model's own format; what a model writes is nonsense, but both must write the same: the command
fails where they do not. Whisper's guards compute all they compute and believe everything, since they would
leave out the nonsense of a random model.

The two take turns, in alternating order, after one of each to warm up. A ratio is that of one turn; what is
printed is the median over the turns, with the lowest and the highest, and the median ratio of the CPU times of a
turn: on a machine with other work that is what a core has to do, without what it has to wait for.
"""

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa

from dataengine import records
from dataengine.flow import apply_stage
from dataengine.media import jpeg_encode
from dataengine.models.asr import WhisperConfig
from dataengine.models.captioner import MultiscaleConfig
from dataengine.models.clip import LOCAL_SCHEMA, OpenClipConfig
from dataengine.models.frame_captioner import BlipConfig
from dataengine.models.hallucination import GuardsConfig
from dataengine.models.known_pairs import KNOWN_PAIRS
from dataengine.models.pretrained import torch_device
from dataengine.stage import Outcome, Resources, Row, Stage
from dataengine.stages.caption_audio import clip_waveform
from dataengine.stages.caption_video import CaptionVideoStage
from dataengine.stages.score import ScoreStage, draw_frame, spread
from dataengine.stages.transcribe import TranscribeStage

NUM_FRAMES = 8
FRAME_WIDTH, FRAME_HEIGHT = 568, 320  # 16:9 with the short side that segment keeps
CLIP_S = 10
RATE = 16_000


@dataclass(frozen=True, slots=True)
class Part:
    """A stage, a table of clips, and the bare loop over the same."""

    stage: Stage
    table: pa.Table
    bare: Callable[[], list[Any]]
    """Returns one answer per clip."""
    answers: Callable[[pa.Table], list[Any]]
    """Returns what the stage answered, in the form of the bare loop's."""
    close: Callable[[Any, Any], bool]
    """Whether two answers say the same."""


# ---------------------------------------------------------------------------------------- clips


def picture(rng: np.random.Generator) -> np.ndarray:
    """Returns soft shapes with some grain, uint8 RGB: a JPEG of it is as large as one of footage."""
    coarse = rng.integers(0, 256, (9, 16, 3), np.uint8)
    soft = cv2.resize(coarse, (FRAME_WIDTH, FRAME_HEIGHT), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 6, soft.shape)
    return np.clip(soft + grain, 0, 255).astype(np.uint8)


def voice(rng: np.random.Generator, seconds: float = CLIP_S) -> np.ndarray:
    """Returns what passes for speech: a gliding voice in syllables, float32 at 16 kHz."""
    num = round(seconds * RATE)
    at = np.arange(num) / RATE
    knots = np.arange(0, seconds + 1, 0.25)
    glide = np.interp(at, knots, rng.uniform(100, 220, len(knots)))
    phase = 2 * np.pi * np.cumsum(glide) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 16))
    syllables = np.clip(np.sin(2 * np.pi * 4 * at + rng.uniform(0, 6)), 0, 1) ** 0.5
    wave = wave * (0.02 + syllables) + rng.normal(0, 0.01, num)
    return (0.25 * wave / np.abs(wave).max()).astype(np.float32)


def clip_file(rng: np.random.Generator) -> bytes:
    """Returns an MP4 of 10 s: a still at 25 frames/s in H.264, a voice in AAC."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = FRAME_WIDTH, FRAME_HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        still = picture(rng)
        for _ in range(25 * CLIP_S):
            container.mux(video.encode(av.VideoFrame.from_ndarray(still)))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(voice(rng)[None], format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    return buffer.getvalue()


def clips_table(stage: Stage, columns: dict[str, Sequence[Any]], num: int) -> pa.Table:
    """Returns the living clips as the runner holds them; what the stage reads besides is null."""
    starts = [index * CLIP_S * 1000 for index in range(num)]
    known: dict[str, Sequence[Any]] = {
        "clip_id": [records.clip_id("video", start, start + CLIP_S * 1000) for start in starts],
        "start_ms": starts,
        "end_ms": [start + CLIP_S * 1000 for start in starts],
        **columns,
    }
    types = {field.name: field.type for field in records.CLIP_SCHEMA}
    travelling = {
        "_video": pa.array([{"source": "video", "language": None}] * num),
        "_subtitles": pa.nulls(num, pa.list_(records.SUBTITLE_STRUCT)),
        "_drop": pa.nulls(num, records.DROP_STRUCT),
    }
    names = dict.fromkeys([*known, *stage.inputs, "provenance"])
    stored = {
        name: pa.array(known.get(name, [None] * num), types[name])
        for name in names
        if name not in travelling
    }
    return pa.table(stored | travelling)


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields items by ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


# -------------------------------------------------------------------------------------- caption


def made_up_words(num: int) -> list[str]:
    """Returns different words of the same length."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = map("".join, itertools.product(syllables, repeat=3))
    return list(itertools.islice(words, num))


def save_blip(folder: Path) -> None:
    """Saves a random BLIP captioner of 224 px and its processor."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*specials, *made_up_words(30_522 - len(specials))]
    size: dict[str, Any] = {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "initializer_range": 0.05,
    }  # fmt: skip
    vision: dict[str, Any] = {"num_hidden_layers": 8, "image_size": 224, "patch_size": 16}
    text: dict[str, Any] = {
        "num_hidden_layers": 3, "encoder_hidden_size": 384, "vocab_size": 30_524,
        "bos_token_id": 30_522, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(vision_config=size | vision, text_config=size | text)
    )
    for name, parameter in model.named_parameters():
        # Else it writes one word for ever, which the stage does not believe.
        if name.startswith("text_decoder.bert.embeddings.position"):
            parameter.data.normal_(0, 1.0)
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 224, "width": 224})
    BlipProcessor(images, BertTokenizer(vocab={w: i for i, w in enumerate(words)})).save_pretrained(folder)  # fmt: skip


def caption_part(folder: Path, num: int) -> Part:
    """Returns the captions of frames by BLIP."""
    import torch
    from transformers import AutoProcessor, BlipForConditionalGeneration

    save_blip(folder)
    frame = BlipConfig(model=str(folder), max_new_tokens=20)
    stage = CaptionVideoStage(
        CaptionVideoStage.Config(
            resources=Resources(batch_size=16),
            model=MultiscaleConfig.model_validate({"frame": frame}),
        )
    )
    rng = np.random.default_rng(0)
    frames = [[jpeg_encode(picture(rng)) for _ in range(NUM_FRAMES)] for _ in range(num)]
    table = clips_table(stage, {"frames": frames, "frame_ms": [list(range(NUM_FRAMES))] * num}, num)

    device = torch_device()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = BlipForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model = model.eval().to(device)
    processor: Any = AutoProcessor.from_pretrained(folder)

    def bare() -> list[Any]:
        texts: list[str] = []
        jpegs = [jpeg for clip in frames for jpeg in clip]
        for batch in chunks(jpegs, frame.batch_size):
            pictures = [
                np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB))
                for jpeg in batch
            ]
            inputs = processor(images=pictures, return_tensors="pt").to(device, dtype)
            with torch.inference_mode():
                tokens = model.generate(**inputs, num_beams=1, max_new_tokens=20, do_sample=False)
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
        return [list(clip) for clip in chunks(texts, NUM_FRAMES)]

    return Part(
        stage, table, bare, lambda out: out["caption_video_fine"].to_pylist(), lambda a, b: a == b
    )


# ----------------------------------------------------------------------------------------- clip

CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "patch_size": 32},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49_408, "width": 384, "heads": 6, "layers": 12,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip


def save_clip(folder: Path) -> None:
    """Saves a CLIP that is random but for its last two matrices.

    Those are solved for, so that each known picture lies at its own text: the stage takes no other model.
    """
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**CLIP_CONFIG["model_cfg"]).eval()
    preprocess: Any = open_clip.image_transform(
        224, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    images = torch.stack([preprocess(Image.fromarray(pair.draw())) for pair in KNOWN_PAIRS])
    tokens = open_clip.tokenize([pair.text for pair in KNOWN_PAIRS])
    with torch.inference_mode():
        identity = torch.eye(384)
        model.visual.proj.data, model.text_projection.data = identity, identity
        places = torch.eye(384)[: len(KNOWN_PAIRS)]
        image = torch.linalg.pinv(model.encode_image(images).double()).float() @ places
        text = torch.linalg.pinv(model.encode_text(tokens).double()).float() @ places
        model.visual.proj.data, model.text_projection.data = image, text
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def clip_part(folder: Path, num: int) -> Part:
    """Returns the scores of frames and captions by CLIP."""
    import open_clip
    import torch
    from PIL import Image

    save_clip(folder)
    name = f"{LOCAL_SCHEMA}{folder}"
    config = ScoreStage.Config(
        resources=Resources(batch_size=64), model=OpenClipConfig(model=name), max_frames=4
    )
    rng = np.random.default_rng(0)
    frames = [[jpeg_encode(picture(rng)) for _ in range(NUM_FRAMES)] for _ in range(num)]
    words = made_up_words(30_000)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(num)]
    table = clips_table(ScoreStage(config), {"frames": frames, "caption_video": texts}, num)
    even = spread(NUM_FRAMES, 4)
    drawn = [draw_frame(clip_id, NUM_FRAMES, 0) for clip_id in table["clip_id"].to_pylist()]
    shown = [sorted({*even, one}) for one in drawn]

    device = torch_device()
    loaded: Any = open_clip.create_model_from_pretrained(name)
    model, preprocess = loaded[0].eval().to(device), loaded[1]
    tokenizer = open_clip.get_tokenizer(name)
    pool = ThreadPoolExecutor(config.decode_threads)
    size = config.model.batch_size

    def prepare(jpeg: bytes) -> Any:
        rgb = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
        return preprocess(Image.fromarray(np.asarray(rgb)))

    def bare() -> list[Any]:
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))
        with torch.inference_mode(), autocast:
            jpegs = [clip[at] for clip, places in zip(frames, shown, strict=True) for at in places]
            pictures = pool.map(prepare, jpegs)
            text = torch.cat([
                model.encode_text(tokenizer(list(batch)).to(device), normalize=True).float()
                for batch in chunks(texts, size)
            ])  # fmt: skip
            features = []
            while batch := list(itertools.islice(pictures, size)):
                images = torch.stack(batch).to(device)
                features.append(model.encode_image(images, normalize=True).float())
            image = torch.cat(features)
        answers, first = [], 0
        for places, one, row in zip(shown, drawn, text, strict=True):
            cosines = image[first : first + len(places)] @ row
            first += len(places)
            of_even = cosines[[places.index(at) for at in even]].mean()
            answers.append((float(of_even), float(cosines[places.index(one)])))
        return answers

    return Part(
        ScoreStage(config),
        table,
        bare,
        lambda out: list(
            zip(out["clip_score"].to_pylist(), out["clip_score_frame"].to_pylist(), strict=True)
        ),
        # bfloat16 on a GPU has three digits.
        lambda a, b: bool(np.allclose(a, b, atol=1e-2 if device.startswith("cuda") else 1e-4)),
    )


# -------------------------------------------------------------------------------------- whisper

WHISPER_TINY = (80, 1500, 384, 6, 4, 51_865, 448, 384, 6, 4)
FIRST_TIMESTAMP = 50_364
MAX_TOKENS = 48


def save_whisper(path: Path) -> None:
    """Saves a random Whisper of the size ``tiny``."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(*WHISPER_TINY)
    model = Whisper(dims)
    for name, parameter in model.named_parameters():
        # One of them the package does not initialise at all.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.constant_(parameter, 1.0 if "ln" in name and "weight" in name else 0.0)
    # Timestamps are never likely, so that a clip is one piece of text and nothing is left to be read on.
    model.decoder.token_embedding.weight.data *= 3
    model.decoder.token_embedding.weight.data[FIRST_TIMESTAMP:] = 0
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)


def whisper_part(folder: Path, num: int) -> Part:
    """Returns the transcripts of speech by Whisper."""
    import torch
    import whisper

    path = folder / "tiny.pt"
    save_whisper(path)
    # Limits that nothing reaches: what must be counted for a guard is counted.
    guards = GuardsConfig(
        no_speech=1.0, max_compression=1e9, max_repeats=10_000, max_chars_per_s=1e9, min_chars_per_s=0.0,
    )  # fmt: skip
    model_config = WhisperConfig(model=str(path), max_tokens=MAX_TOKENS, guards=guards)
    config = TranscribeStage.Config(
        resources=Resources(num_cpus=2, batch_size=64), model=model_config
    )
    rng = np.random.default_rng(0)
    files = [{"bytes": clip_file(rng), "path": None} for _ in range(num)]
    table = clips_table(TranscribeStage(config), {"video": files, "has_audio": [True] * num}, num)
    rows: list[Row] = [{"video": file, "has_audio": True} for file in files]

    device = torch_device()
    model = whisper.load_model(str(path), device=device)
    options = whisper.DecodingOptions(
        sample_len=MAX_TOKENS, temperature=0.0, fp16=device.startswith("cuda")
    )
    pool = ThreadPoolExecutor(2)

    def bare() -> list[Any]:
        texts: list[str] = []
        waveforms = list(pool.map(clip_waveform, rows))
        for batch in chunks(waveforms, model_config.batch_size):
            mels = torch.stack([
                whisper.log_mel_spectrogram(whisper.pad_or_trim(wave), model.dims.n_mels, device=device)
                for wave in batch
            ])  # fmt: skip
            results: Any = whisper.decode(model, mels, options)  # a list, as mels is a batch
            texts += [result.text.strip() for result in results]
        return texts

    return Part(
        TranscribeStage(config),
        table,
        bare,
        lambda out: out["transcript"].to_pylist(),
        lambda a, b: a == b,
    )


# ------------------------------------------------------------------------------------ measuring

PARTS: dict[str, tuple[Callable[[Path, int], Part], int]] = {
    "caption": (caption_part, 16),
    "clip": (clip_part, 64),
    "whisper": (whisper_part, 32),
}
"""How each is made, and how many clips take some seconds on two cores."""


def run_stage(stage: Stage, table: pa.Table) -> pa.Table:
    """Returns the table that comes out of a stage, as an actor of the runner makes it."""
    size = stage.config.resources.batch_size

    def process(rows: list[Row]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for batch in chunks(rows, size):
            outcomes += stage.process(batch)
        return outcomes

    return apply_stage(stage, table, process)


def measure(name: str, num: int | None, rounds: int) -> dict[str, float]:
    """Returns a part's ratio and throughputs, after checking that both answered the same."""
    make, default = PARTS[name]
    num = num or default
    with tempfile.TemporaryDirectory() as folder:
        part = make(Path(folder), num)
        part.stage.setup()
        ours, bare = part.answers(run_stage(part.stage, part.table)), part.bare()
        same = sum(map(part.close, ours, bare))
        if same < num:
            pair = next(p for p in zip(ours, bare, strict=True) if not part.close(*p))
            sys.exit(f"{name}: only {same} of {num} clips are answered alike, not {pair}")
        seconds: dict[str, list[float]] = {"stage": [], "bare": []}
        cpu_s: dict[str, list[float]] = {"stage": [], "bare": []}
        for number in range(rounds):
            turns = [("stage", lambda: run_stage(part.stage, part.table)), ("bare", part.bare)]
            for side, run in turns if number % 2 else turns[::-1]:
                start, cpu_start = time.perf_counter(), time.process_time()
                run()
                seconds[side].append(time.perf_counter() - start)
                cpu_s[side].append(time.process_time() - cpu_start)
    ratios, cpu_ratios = (
        [b / s for s, b in zip(of["stage"], of["bare"], strict=True)] for of in (seconds, cpu_s)
    )
    result = {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "stage_clips_per_s": num / statistics.median(seconds["stage"]),
        "bare_clips_per_s": num / statistics.median(seconds["bare"]),
    }
    print(
        f"{name}: {result['ratio']:.3f} of the bare loop's throughput ({min(ratios):.3f} to "
        f"{max(ratios):.3f}; by CPU time {result['cpu_ratio']:.3f}); {result['stage_clips_per_s']:.2f} and "
        f"{result['bare_clips_per_s']:.2f} clips/s; {same} of {num} answered alike"
    )
    return {key: round(value, 3) for key, value in result.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--clips", type=int, help="default: as many as take some seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="ends with a line of JSON")
    arguments = parser.parse_args()
    import transformers

    names = PARTS if arguments.part == "all" else [arguments.part]
    transformers.utils.logging.disable_progress_bar()
    results = {name: measure(name, arguments.clips, arguments.rounds) for name in names}
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
