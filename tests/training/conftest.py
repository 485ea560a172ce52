# SPDX-License-Identifier: Apache-2.0
"""Tiny corpora in the layout training reads, and recipes that fit them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from dataengine import records
from training.config import config_from_dict

COLOURS = {
    "red": (210, 30, 30),
    "green": (30, 170, 40),
    "blue": (30, 60, 210),
    "yellow": (230, 210, 40),
    "purple": (140, 40, 170),
    "white": (240, 240, 240),
}
SHADES = {"black": 10, "grey": 110, "bright": 190}
SHAPES = ("circle", "square", "bar")


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads that share a busy core wait for each other; results must not depend on it."""
    torch.set_num_threads(1)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def shape_frames(colour, shape, shade, rng, num_frames=4, size=(64, 48)):
    """JPEGs of a shape that stays about where it is."""
    width, height = size
    x, y = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6)
    r = height * rng.uniform(0.25, 0.35)
    frames = []
    for _ in range(num_frames):
        image = Image.new("RGB", size, (SHADES[shade],) * 3)
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse([x - r, y - r, x + r, y + r], fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle([x - r, y - r, x + r, y + r], fill=COLOURS[colour])
        else:
            draw.rectangle([0, y - r / 3, width, y + r / 3], fill=COLOURS[colour])
        frames.append(jpeg(image))
    return frames


def clip_row(source, number, **columns):
    """A row of CLIP_SCHEMA; clip 3 of video 2 is ``video-2_3000_4000``."""
    video_id, start_ms = f"video-{source}", number * 1000
    return {
        **dict.fromkeys(records.CLIP_SCHEMA.names),
        "clip_id": records.clip_id(video_id, start_ms, start_ms + 1000),
        "video_id": video_id,
        "start_ms": start_ms,
        "end_ms": start_ms + 1000,
        **columns,
    }


def random_rows(num_videos, clips_per_video=3, seed=0):
    """Clips of shapes with a caption that names what is seen."""
    rng = np.random.default_rng(seed)
    rows = []
    for video in range(num_videos):
        for number in range(clips_per_video):
            colour, shade = rng.choice(list(COLOURS)), rng.choice(list(SHADES))
            shape = rng.choice(SHAPES)
            frames = shape_frames(colour, shape, shade, rng)
            caption = f"A {colour} {shape} on {shade} ground."
            rows.append(clip_row(video, number, frames=frames, caption=caption))
    return rows


def write_rows(folder, rows, *, shard_rows=20, row_group_rows=6):
    """Writes a corpus as the layout's description has it, without the engine's own writer."""
    for name in ("shards", "catalog"):
        (folder / name).mkdir(parents=True)
    (folder / "corpus.json").write_text(json.dumps({"format_version": 1}))
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        part = rows[start : start + shard_rows]
        table = pa.Table.from_pylist(part, schema=records.CLIP_SCHEMA)
        shard = f"shard{number:02d}"
        pq.write_table(table, folder / "shards" / f"{shard}.parquet", row_group_size=row_group_rows)
        places = range(len(part))
        locator = {
            "shard": pa.array([shard] * len(part)),
            "row_group": pa.array([i // row_group_rows for i in places], pa.int32()),
            "row": pa.array([i % row_group_rows for i in places], pa.int32()),
        }
        catalog = table.drop_columns(list(records.SHARD_COLUMNS))
        for name, column in locator.items():
            catalog = catalog.append_column(name, column)
        catalog = catalog.cast(records.CATALOG_SCHEMA)
        pq.write_table(catalog, folder / "catalog" / f"{shard}.parquet")
    return str(folder)


@pytest.fixture
def write_corpus(tmp_path):
    """Returns a function: rows -> the corpus' path."""

    def write(rows, name="corpus", **layout):
        return write_rows(tmp_path / name, rows, **layout)

    return write


@pytest.fixture(scope="session")
def shapes_corpus(tmp_path_factory) -> str:
    """90 clips of 30 videos in 5 shards of 4 row groups."""
    return write_rows(tmp_path_factory.mktemp("data") / "shapes", random_rows(30))


@pytest.fixture
def make_row():
    return clip_row


@pytest.fixture
def make_frames():
    return shape_frames


@pytest.fixture
def recipe():
    """Returns a function: dotted overrides -> a config that takes milliseconds a step."""

    def make(**overrides):
        document = {
            "model": {
                "kind": "viclip",
                "embed_dim": 16,
                "video": {
                    "image_size": 32,
                    "patch_size": 16,
                    "num_frames": 2,
                    "width": 32,
                    "layers": 2,
                    "heads": 2,
                },
                "text": {"context_length": 16, "width": 16, "layers": 1, "heads": 2},
                "init_temperature": 0.1,
            },
            "data": {
                "held_out": 0.25,
                "batch_size": 8,
                "lanes": 2,
                "shuffle_buffer": 10,
                "flip": False,
            },
            "optim": {"lr": 1e-3, "steps": 6},
            "run": {"seed": 1, "log_every": 2, "checkpoint_every": 100},
        }
        for name, value in overrides.items():
            *parents, last = name.split("__")
            node = document
            for parent in parents:
                node = node[parent]
            node[last] = value
        return config_from_dict(document, "a test")

    return make


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]
