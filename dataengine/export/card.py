# SPDX-License-Identifier: Apache-2.0
"""The dataset card of a corpus: facts for the reader, and a YAML header for the hub's machinery."""

import json
from importlib.metadata import version
from typing import Any

import duckdb
import pyarrow as pa
import yaml

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.export.selection import Choice, where_clause
from dataengine.export.settings import ExportSettings

_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
"""The hub's size categories."""

_MEANINGS = {
    "clip_id": "video, start and end; unique",
    "video_id": "YouTube's id, else a hash of the file or URL",
    "source_url": "where the video came from",
    "start_ms": "start of the clip in its video, milliseconds",
    "end_ms": "end, exclusive",
    "duration_ms": "length",
    "fps": "frames per second of the source",
    "width": "pixels, as displayed",
    "height": "pixels, as displayed",
    "has_audio": "whether the clip has sound",
    "video": "the clip as MP4",
    "frames": "JPEGs spread evenly over the clip",
    "frame_ms": "their times on the video's clock",
    "caption_video_coarse": "caption of the middle frame",
    "caption_video_fine": "captions frame by frame",
    "caption_video": "what is seen",
    "caption_audio": "what is heard",
    "transcript": "what is said",
    "transcript_segments": "the same with times",
    "language": "of the transcript, ISO 639",
    "language_score": "certainty of the language",
    "transcript_en": "transcript in English",
    "caption_speech": "what is said, as a sentence",
    "caption_av": "seen and heard",
    "caption_avs": "seen, heard and said",
    "caption": "the text to train on",
    "clip_score": "cosine of CLIP's image and text embeddings, mean over the frames",
    "clip_score_frame": "the same of one frame drawn at random",
    "aesthetic_score": "about 1 to 10",
    "video_text_score": "cosine of a video and a text encoder",
    "motion_score": "mean change of brightness per frame, 0 to 1",
    "still_score": "share of the time in which nothing moves",
    "jump_score": "abrupt changes of the picture per second",
    "start_detectors": "which shot detectors see a cut at the start",
    "end_detectors": "which see one at the end",
    "title": "of the video, by its uploader",
    "description": "the same",
    "tags": "the same",
    "categories": "the same",
    "clip_image_embedding": "unit vector of the frames, float16",
    "clip_text_embedding": "unit vector of the caption, float16",
    "provenance": "which model wrote which column, with revision and prompt",
}
_MOST_ROWS = 60


def card(
    corpus: Corpus,
    db: duckdb.DuckDBPyConnection,
    choice: Choice,
    settings: ExportSettings,
    found: dict[str, Any],
    files: str,
) -> str:
    """Returns the text of ``README.md``.

    Args:
        corpus: What the dataset is of.
        db: See `dataengine.query.sql.connect`.
        choice: Which clips.
        settings: Of the export.
        found: See `dataengine.export.selection.facts`.
        files: Glob of the Parquet files, relative to the card.
    """
    schema = corpus.clip_schema
    where = where_clause(choice)
    languages = db.execute(
        f"select language, count(*) as n from (from clips{where}) where language is not null "
        f"group by language order by n desc, language limit {_MOST_ROWS}"
    ).fetchall()
    header = {
        "license": "other",
        "license_name": "to-be-filled-in",
        "pretty_name": _name(corpus, settings),
        # Captions are English; what is said is in the others.
        "language": list(dict.fromkeys(["en", *(code for code, _ in languages)])),
        "size_categories": [size_category(found["num_clips"])],
        "task_categories": ["text-to-video", "video-text-to-text"],
        "tags": ["video", "audio", "captions", "video-text"],
        "configs": [
            {
                "config_name": "default",
                "default": True,
                "data_files": [{"split": "train", "path": files}],
            }
        ],
        "dataset_info": {"features": features(schema)},
    }
    sections = [
        _summary(corpus, settings, choice, found),
        _statistics(db, where, languages),
        _columns(corpus, schema),
        _provenance(db, where),
        _reading(files),
        _TERMS,
    ]
    top = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n" + "\n\n".join(sections) + "\n"


def size_category(num_clips: int) -> str:
    """Returns the hub's name for a number of rows."""
    return next((name for limit, name in _SIZES if num_clips < limit), "n>1B")


def features(schema: pa.Schema) -> list[dict[str, Any]]:
    """Returns the columns as the ``features`` of a card's header."""
    return [
        {"name": field.name, "dtype": "video"}
        if field.name == "video"
        else {"name": field.name, **_feature(field.type)}
        for field in schema
    ]


def _feature(type_: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(type_):
        inner = _feature(type_.value_type)
        return {"list": inner.get("dtype", inner.get("struct", inner))}
    if pa.types.is_struct(type_):
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in type_]}
    names = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}
    return {"dtype": names.get(type_, str(type_))}


def _name(corpus: Corpus, settings: ExportSettings) -> str:
    name = corpus.root.rpartition("/")[2]
    return f"{name} ({settings.subset})" if settings.subset else name


def _summary(
    corpus: Corpus, settings: ExportSettings, choice: Choice, found: dict[str, Any]
) -> str:
    how = []
    if settings.subset:
        from dataengine.query.subsets import read_definition

        about = read_definition(corpus, settings.subset).get("definition")
        how.append(f"It is the subset `{settings.subset}`:\n\n```json\n{json.dumps(about)}\n```")
    if settings.where:
        how.append(f"Its clips meet this condition:\n\n```sql\n{choice.condition.strip()}\n```")
    part = "a part of a corpus" if how else "a corpus"
    return "\n\n".join(
        [
            f"# {_name(corpus, settings)}",
            f"{found['num_clips']:,} clips of {found['num_videos']:,} videos, "
            f"{found['hours']:,.2f} hours, with captions, transcripts, scores and media: {part} "
            f"made with dataengine {version('dataengine')}, as of {found['date']}.",
            *how,
        ]
    )


def _statistics(db: duckdb.DuckDBPyConnection, where: str, languages: list[tuple[str, int]]) -> str:
    row = db.execute(
        "select min(duration_ms) / 1000.0, median(duration_ms) / 1000.0, max(duration_ms) / 1000.0, "
        "count(*) filter (caption <> ''), "
        "avg(length(string_split_regex(trim(caption), '\\s+'))) filter (trim(caption) <> ''), "
        "count(*) filter (has_audio), count(*) filter (transcript <> ''), "
        f"median(least(width, height)) from clips{where}"
    ).fetchone()
    assert row is not None  # an aggregate always gives one row
    lines = ["## Statistics", "", "| fact | value |", "|---|---|"]
    if row[0] is not None:
        lines.append(
            f"| length of a clip: least, median, most | {row[0]:g}, {row[1]:g}, {row[2]:g} s |"
        )
        lines.append(f"| clips with a caption | {row[3]:,} |")
        lines.append(f"| words of a caption, mean | {row[4] or 0:.1f} |")
        lines.append(f"| clips with sound | {row[5]:,} |")
        lines.append(f"| clips with speech | {row[6]:,} |")
        lines.append(f"| short side, median | {row[7]:g} px |")
    if languages:
        spoken = ", ".join(f"{code} {number:,}" for code, number in languages[:20])
        lines.append(f"| languages of speech | {spoken} |")
    return "\n".join(lines)


def _columns(corpus: Corpus, schema: pa.Schema) -> str:
    added = corpus.added_columns
    lines = ["## Columns", "", "| column | type | meaning |", "|---|---|---|"]
    for field in schema:
        meaning = _MEANINGS.get(field.name, "")
        if field.name in added:
            meaning = f"annotated later, like `{added[field.name]}`"
        lines.append(f"| `{field.name}` | {_type_name(field.type)} | {meaning} |")
    return "\n".join(lines)


def _type_name(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list of {_type_name(type_.value_type)}"
    if type_ == records.MEDIA_STRUCT:
        return "MP4"
    if pa.types.is_struct(type_):
        return "{" + ", ".join(field.name for field in type_) + "}"
    return {"halffloat": "float16", "float": "float32", "binary": "bytes"}.get(
        str(type_), str(type_)
    )


def _provenance(db: duckdb.DuckDBPyConnection, where: str) -> str:
    rows = db.execute(
        "select p.column, p.model, p.revision, p.prompt_hash, count(*) as n from "
        f"(select unnest(provenance) as p from clips{where}) group by all order by 1, n desc, 2, 3, 4 "
        f"limit {_MOST_ROWS}"
    ).fetchall()
    lines = [
        "## Provenance",
        "",
        "Each row says in `provenance` which model wrote which column.",
        "",
    ]
    lines += ["| column | model | revision | prompt | clips |", "|---|---|---|---|---|"]
    for column, model, revision, prompt, number in rows:
        cells = [_cell(value) for value in (column, model, revision, prompt)]
        lines.append(f"| {' | '.join(cells)} | {number:,} |")
    return "\n".join(lines)


def _cell(value: str | None) -> str:
    return (value or "").replace("|", "\\|").replace("\n", " ")


def _reading(files: str) -> str:
    return f"""## Reading it

```python
from datasets import Video, load_dataset

clips = load_dataset("parquet", data_files="{files}", split="train", streaming=True)
clips = clips.cast_column("video", Video(decode=False))  # bytes; with torchcodec, leave this out
```

A clip that was cut without encoding it again begins at a key frame; frames before its first are hidden by an
edit list. PyAV, OpenCV, ffmpeg and torchcodec (exact mode) honour it, decord does not."""


_TERMS = """## Intended use

Training and evaluating models that relate video, sound and text: retrieval, captioning, generation.
Captions, transcripts and scores were made by models and hold their mistakes; nothing in them is a
statement of fact about a person.

## Bias

The videos were chosen by the sources that this corpus was given, and its languages, places and people
are theirs: they are not a sample of the world. Captions and scores carry the leanings of the models
named under Provenance; filtering by a score favours what that model was trained on.

## Licence

*To be filled in by who publishes this dataset.* The videos belong to their authors; `source_url` says
where each came from.

## Takedown

*Name an address here.* A video is taken out with `dataengine remove`, and out of this dataset by
writing the export again: `dataengine export --refresh FOLDER`. Only the files that held it change."""
