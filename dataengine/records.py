# SPDX-License-Identifier: Apache-2.0
"""What a clip, a video and a source are on disk: Arrow schemas and deterministic ids.

This module is the contract between the engine, the query layer and the trainer. It imports
nothing but pyarrow and the standard library.

Time is integer milliseconds of presentation time counted from the container's start (what a
player shows and ``ffmpeg -ss`` takes), and spans are half-open: ``[start_ms, end_ms)``.
"""

import hashlib
import json
import re
from io import BufferedReader
from urllib.parse import parse_qs, urlsplit, urlunsplit

import pyarrow as pa

FORMAT_VERSION = 1
"""Version of the corpus layout; readers refuse a newer one."""

# --------------------------------------------------------------------------------------- types

MEDIA_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Exactly what Hugging Face's ``Video`` feature stores. ``large_binary`` would not be recognised."""

SEGMENT_STRUCT = pa.struct(
    [("start_ms", pa.int64()), ("end_ms", pa.int64()), ("text", pa.string())]
)
"""A piece of transcript; times are on the source video's clock."""

SUBTITLE_STRUCT = pa.struct(
    [
        ("language", pa.string()),
        ("start_ms", pa.int64()),
        ("end_ms", pa.int64()),
        ("text", pa.string()),
        ("origin", pa.string()),
    ]
)
"""One cue of a source's subtitles; the column ``_subtitles`` is a list of these, or null.

Times are on the source video's clock; language is a BCP 47 tag or null; tracks may be mixed.
``origin`` is ``sidecar`` (a file beside a local video), ``manual`` or ``automatic`` (a page's).
"""

SPAN_STRUCT = pa.struct(
    [
        ("start_ms", pa.int64()),
        ("end_ms", pa.int64()),
        ("caption", pa.string()),
        ("aesthetic_score", pa.float32()),
        ("video_text_score", pa.float32()),
    ]
)
"""A clip that a published annotation list gives; the column ``_spans`` is a list of these, or null.

Times are on the source video's clock; what the list does not say is null.
"""

GIVEN = "given"
"""Model name, in the provenance, of what a published annotation list says."""

REFUSAL_STRUCT = pa.struct([("reason", pa.string()), ("detail", pa.string())])
"""Why the plan keeps a source from being fetched (``duplicate``, ``excluded``): the column
``_refusal``, null for all others."""

PROVENANCE_STRUCT = pa.struct(
    [
        ("column", pa.string()),
        ("model", pa.string()),
        ("revision", pa.string()),
        ("prompt_hash", pa.string()),
        ("input_hash", pa.string()),
        ("note", pa.string()),
    ]
)
"""Who wrote a column of this row: model id, its revision, hash of the prompt file, hash of the frames
that were shown, and what was unusual (``failed:<reason>``, ``no_sound``, ``template:<reason>``); the
last three are null where there is nothing to say."""

DROP_STRUCT = pa.struct(
    [
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("retryable", pa.bool_()),
    ]
)
"""Why a row ended: travels in the column ``_drop``, null while the row is alive."""

DROP_COUNT_STRUCT = pa.struct(
    [
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("num_clips", pa.int64()),
        ("duration_ms", pa.int64()),
    ]
)
"""Clips of one video that ended for one reason."""

# --------------------------------------------------------------------------------------- clips

MEDIA_COLUMNS = ("video", "frames")
"""Columns of media: stored as they are, without compression."""

SHARD_COLUMNS = (*MEDIA_COLUMNS, "clip_image_embedding", "clip_text_embedding")
"""Columns that live in shards only, never in the catalog."""

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("source_url", pa.string()),
        ("start_ms", pa.int64()),
        ("end_ms", pa.int64()),
        ("duration_ms", pa.int64()),
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("has_audio", pa.bool_()),
        # MP4 with its audio track. A clip cut by stream copy hides its pre-roll behind an edit
        # list: read it with PyAV, OpenCV, ffmpeg or torchcodec in exact mode, never with decord.
        ("video", MEDIA_STRUCT),
        ("frames", pa.list_(pa.binary())),  # JPEG, in time order, spread evenly over the clip
        ("frame_ms", pa.list_(pa.int64())),  # one per frame, on the source video's clock
        ("caption_video_coarse", pa.string()),  # the middle frame
        ("caption_video_fine", pa.list_(pa.string())),  # frame by frame
        ("caption_video", pa.string()),
        ("caption_audio", pa.string()),
        ("transcript", pa.string()),
        ("transcript_segments", pa.list_(SEGMENT_STRUCT)),
        ("language", pa.string()),  # ISO 639-1, else 639-3, of the transcript
        ("language_score", pa.float32()),
        ("transcript_en", pa.string()),
        ("caption_speech", pa.string()),
        ("caption_av", pa.string()),
        ("caption_avs", pa.string()),
        ("caption", pa.string()),  # what training reads unless told otherwise
        ("clip_score", pa.float32()),  # cosine of CLIP image and text embeddings, in [-1, 1]
        ("clip_score_frame", pa.float32()),  # the same of one frame drawn at random
        ("aesthetic_score", pa.float32()),  # about 1 to 10
        ("video_text_score", pa.float32()),  # cosine of a video and a text encoder, in [-1, 1]
        ("motion_score", pa.float32()),  # mean absolute luma difference per frame, in [0, 1]
        ("still_score", pa.float32()),  # share of the clip's time in which nothing moves, in [0, 1]
        ("jump_score", pa.float32()),  # abrupt changes of the whole picture per second
        # Which detectors see a boundary where the clip starts and ends; null when only one ran.
        ("start_detectors", pa.list_(pa.string())),
        ("end_detectors", pa.list_(pa.string())),
        ("title", pa.string()),
        ("description", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("categories", pa.list_(pa.string())),
        # Unit vectors of the model behind clip_score, where they are kept: mean of the frames, caption.
        ("clip_image_embedding", pa.list_(pa.float16())),
        ("clip_text_embedding", pa.list_(pa.float16())),
        ("provenance", pa.list_(PROVENANCE_STRUCT)),
    ]
)
"""One row of ``shards/*.parquet``."""

LOCATOR_FIELDS = [("shard", pa.string()), ("row_group", pa.int32()), ("row", pa.int32())]
"""Where a clip's media lies: shard name without suffix, row group, row inside the row group."""

CATALOG_SCHEMA = pa.schema(
    [field for field in CLIP_SCHEMA if field.name not in SHARD_COLUMNS]
    + [pa.field(name, type_) for name, type_ in LOCATOR_FIELDS]
)
"""One row of ``catalog/*.parquet``: the clip without its media, and where the media is."""

# -------------------------------------------------------------------------------------- videos

KEPT, DROPPED, FAILED, REMOVED = "kept", "dropped", "failed", "removed"
"""A video's status: it gave clips; its own nature forbids it; a later attempt may succeed; it was
taken out and must not come back."""

VIDEO_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # path or URL as listed: the ledger's key
        ("source_version", pa.string()),  # "<bytes>-<mtime ns>" of a local file, else empty
        ("video_id", pa.string()),
        ("status", pa.string()),
        ("stage", pa.string()),  # where it ended, null if kept
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
        ("run_id", pa.string()),
        ("finished_ms", pa.int64()),  # Unix time
        ("fingerprint", pa.string()),  # of the pipeline that made its clips
        ("shard", pa.string()),  # null if it gave no clips
        ("num_clips", pa.int64()),
        ("clips_ms", pa.int64()),
        ("dropped_clips", pa.list_(DROP_COUNT_STRUCT)),
        ("duration_ms", pa.int64()),
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("video_codec", pa.string()),
        ("audio_codec", pa.string()),
        ("file_bytes", pa.int64()),
        ("decode_errors", pa.int32()),  # damaged packets that were skipped
        ("truncated", pa.bool_()),  # whether the file breaks off
        ("title", pa.string()),
        ("description", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("categories", pa.list_(pa.string())),
        ("upload_date", pa.string()),
        ("license", pa.string()),
        ("language", pa.string()),  # as the source says, BCP 47
        ("age_limit", pa.int32()),  # years
        ("channel_id", pa.string()),
    ]
)
"""One row of ``videos/*.parquet``: every source ends as exactly one current row."""

# ----------------------------------------------------------------------------------------- ids

YOUTUBE_ID = re.compile(r"[0-9A-Za-z_-]{11}")
"""What a YouTube id looks like."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
YOUTUBE_HOSTS = frozenset(
    f"{host}youtube{end}"
    for host in ("", "www.", "m.", "music.")
    for end in (".com", "-nocookie.com")
)
"""Names under which YouTube shows its videos."""


def clip_id(video_id: str, start_ms: int, end_ms: int) -> str:
    """Returns the id of a span of a video, the same wherever and whenever it is cut."""
    return f"{video_id}_{start_ms}_{end_ms}"


def digest(*parts: str | bytes) -> str:
    """Returns 16 hex digits that depend on every part and on where the parts are split."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def youtube_id(source: str) -> str | None:
    """Returns the 11-character id of a YouTube watch, short, embed or youtu.be URL, else None."""
    url = urlsplit(source)
    host = (url.hostname or "").lower()
    if host in ("youtu.be", "www.youtu.be"):
        candidate = url.path.strip("/").split("/")[0]
    elif host in YOUTUBE_HOSTS and url.path.rstrip("/") == "/watch":
        candidate = parse_qs(url.query).get("v", [""])[0]
    elif host in YOUTUBE_HOSTS and url.path.startswith(("/shorts/", "/embed/", "/live/", "/v/")):
        candidate = url.path.split("/")[2]
    else:
        return None
    return candidate if YOUTUBE_ID.fullmatch(candidate) else None


def is_url(source: str) -> bool:
    """Returns whether a source is fetched over the network rather than read from a file."""
    try:
        return urlsplit(source).scheme.lower() in {"http", "https"}
    except ValueError:
        return False  # such as an unclosed bracket


def is_object(source: str) -> bool:
    """Returns whether a source lies in an object store: ``s3://``, ``gs://``, any fsspec URL."""
    scheme = _SCHEME.match(source)
    return scheme is not None and scheme[1].lower() not in {"http", "https", "file"}


def canonical_url(url: str) -> str:
    """Returns the URL with scheme and host in lower case and without its fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path, parts.query, ""))


def url_video_id(url: str) -> str:
    """Returns a URL's video id: YouTube's own id where there is one, else a hash of the URL."""
    return youtube_id(url) or digest(canonical_url(url))


def file_video_id(path: str) -> str:
    """Returns a local file's video id: a hash of its bytes, so that moving it changes nothing.

    Raises:
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        return stream_video_id(file)


def stream_video_id(file: BufferedReader) -> str:
    """Returns the video id of what is read from an open file; see `file_video_id`."""
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


# ------------------------------------------------------------------------------------ metadata


def hugging_face_metadata(schema: pa.Schema) -> dict[bytes, bytes]:
    """Returns schema metadata that makes ``datasets.load_dataset("parquet")`` play ``video``."""
    features = {name: {"_type": "Video"} for name in schema.names if name == "video"}
    features |= {field.name: _feature(field.type) for field in schema if field.name not in features}
    ordered = {name: features[name] for name in schema.names}
    return {b"huggingface": json.dumps({"info": {"features": ordered}}).encode()}


def _feature(type_: pa.DataType) -> object:
    """Returns one column's Hugging Face feature as its JSON form."""
    if pa.types.is_struct(type_):
        return {field.name: _feature(field.type) for field in type_}
    if pa.types.is_list(type_):
        return {"feature": _feature(type_.value_type), "_type": "List"}
    names = {
        pa.float16(): "float16",
        pa.float32(): "float32",
        pa.float64(): "float64",
        pa.bool_(): "bool",
    }
    return {"dtype": names.get(type_, str(type_)), "_type": "Value"}
