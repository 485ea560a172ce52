# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + CLIP scores and, where asked for, an aesthetic score and the embeddings.

``clip_score`` is the mean cosine of CLIP's text embedding and the image embeddings of up to four
evenly spread frames (InternVid section 3.3 and appendix C sample four). ``clip_score_frame`` is that
of one frame drawn at random, which is what InternVid-FLT was filtered by: its best 30 % by
CLIP ViT-L/14 (appendix E.1). ``aesthetic_score`` is the highest of the even frames (section 3.3).
Every picture is embedded once. Nothing is dropped for a low score: subsets decide. A caption longer
than the model's context is scored by its beginning.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataengine.media import jpeg_decode
from dataengine.models.aesthetics import AestheticsConfig, load_head
from dataengine.models.answers import Failure
from dataengine.models.captioner import spread
from dataengine.models.clip import (
    ClipScorer,
    ClipScorerConfig,
    OpenClipConfig,
    build_clip_scorer,
    check_clip,
    unit,
)
from dataengine.records import digest
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption_video", "caption_video_coarse", "caption_av", "caption_avs", "caption")

CaptionColumn = Literal[
    "caption_video", "caption_video_coarse", "caption_av", "caption_avs", "caption"
]

BAD_FRAMES = "bad_frames"
"""Drop reason: a clip with a frame that is not a JPEG."""


def draw_frame(clip_id: str, num_frames: int, seed: int) -> int:
    """Returns the index of one frame, every one as likely, and the same in every run.

    Args:
        clip_id: The draw depends on it alone, not on the clip's place in a batch or a shard.
        num_frames: Of the clip, at least 1.
        seed: Another seed draws anew for all clips.
    """
    return int(digest("clip_score_frame", clip_id, str(seed)), 16) % num_frames


class Preparer(Protocol):
    """What makes a frame into what a model sees."""

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns a uint8 array, the same shape for every frame; called from several threads."""
        ...


def prepare_jpegs(
    preparer: Preparer, jpegs: Iterable[bytes], pool: ThreadPoolExecutor
) -> Iterator[np.ndarray | Failure]:
    """Decodes and prepares pictures in a pool's threads, all started at once.

    Yields:
        Each in order as soon as it is there, a `Failure` for one that is not a picture.
    """

    def work(jpeg: bytes) -> np.ndarray | Failure:
        try:
            return preparer.prepare(jpeg_decode(jpeg))
        except ValueError as error:
            return Failure(BAD_FRAMES, str(error))

    return pool.map(work, jpegs)


def embed_prepared(
    scorer: ClipScorer, prepared: Iterable[np.ndarray | Failure]
) -> list[np.ndarray | Failure]:
    """Returns an embedding per picture; the model works while the next ones are prepared."""
    answers: list[np.ndarray | Failure] = []
    pictures = iter(prepared)
    while batch := list(islice(pictures, scorer.batch_size)):
        good = [picture for picture in batch if not isinstance(picture, Failure)]
        embedded = iter(scorer.embed_images(good) if good else ())
        answers += [
            picture if isinstance(picture, Failure) else next(embedded) for picture in batch
        ]
    return answers


@dataclass(frozen=True, slots=True)
class _Clip:
    """What is asked about one row: which frames, and which of all pictures of the batch they are."""

    even: tuple[int, ...]
    drawn: int
    """Frames by their place among `shown`."""
    shown: tuple[int, ...]
    """Frames of the clip, in order."""
    first: int
    """Where the clip's pictures begin among those of the batch."""
    text: int | None
    """Which text of the batch is the clip's."""


class ScoreStage(Stage):
    """Writes ``clip_score`` and ``clip_score_frame``; null for a clip without a caption."""

    name = "score"
    inputs = ("clip_id", "frames", *CAPTION_COLUMNS)
    outputs = pa.schema(
        [
            ("clip_score", pa.float32()),
            ("clip_score_frame", pa.float32()),
            ("aesthetic_score", pa.float32()),
            ("clip_image_embedding", pa.list_(pa.float16())),
            ("clip_text_embedding", pa.list_(pa.float16())),
        ]
    )

    class Config(Stage.Config):
        """Settings of scoring."""

        model: ClipScorerConfig = OpenClipConfig()
        """Who scores. InternVid's CLIP is ``{model: ViT-L-14-quickgelu, pretrained: openai}``."""
        caption_column: CaptionColumn = "caption_video"
        """The text that is compared with the frames."""
        max_frames: int = Field(default=4, ge=1)
        """Most frames compared per clip for ``clip_score`` and ``aesthetic_score``."""
        seed: int = 0
        """Of the draw for ``clip_score_frame``."""
        embeddings: bool = False
        """Whether shards keep ``clip_image_embedding`` (of the even frames' mean) and
        ``clip_text_embedding``, unit vectors in float16."""
        aesthetics: AestheticsConfig | None = None
        """Who judges the pictures' looks; None writes no ``aesthetic_score``."""
        decode_threads: int = Field(default=2, ge=1)
        """JPEGs decoded side by side while the model works."""
        neutral: ClassVar[frozenset[str]] = Stage.Config.neutral | {"decode_threads"}

    config: Config

    def setup(self) -> None:
        """Loads the models; each proves itself on known pairs first."""
        self._scorer = build_clip_scorer(self.config.model)
        check_clip(self._scorer)
        self._judged, self._head = self._scorer, None
        if (aesthetics := self.config.aesthetics) is not None:
            self._head = load_head(aesthetics)
            if aesthetics.model not in (None, self.config.model):
                self._judged = build_clip_scorer(aesthetics.model)
                check_clip(self._judged)
            self._head.check_fits(self._judged, aesthetics.any_clip)
        self._pool = ThreadPoolExecutor(self.config.decode_threads, "decode")

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Scores all rows in one batch.

        A clip whose model fails keeps its other columns and says so in its provenance; one with a broken
        JPEG is no clip to train on and ends as Drop("bad_frames").
        """
        asked: list[_Clip | None] = []
        jpegs: list[bytes] = []
        texts: list[str] = []
        for row in batch:
            frames, text = row.get("frames") or [], row.get(self.config.caption_column)
            if not frames or not (text or self._needs_no_text):
                asked.append(None)
                continue
            even = spread(len(frames), self.config.max_frames)
            drawn = draw_frame(row.get("clip_id") or "", len(frames), self.config.seed)
            shown = sorted({*even, drawn} if text else even)
            clip = _Clip(
                even=tuple(shown.index(at) for at in even),
                drawn=shown.index(drawn) if text else 0,
                shown=tuple(shown),
                first=len(jpegs),
                text=len(texts) if text else None,
            )
            asked.append(clip)
            jpegs += [frames[at] for at in shown]
            texts += [text] if text else []

        prepared = prepare_jpegs(self._scorer, jpegs, self._pool)
        text_answers = self._scorer.embed_texts(texts) if texts else []
        images = embed_prepared(self._scorer, prepared)
        judged = images
        if self._judged is not self._scorer:
            judged = embed_prepared(self._judged, prepare_jpegs(self._judged, jpegs, self._pool))
        return [
            Kept(({"clip_score": None, "clip_score_frame": None},))
            if clip is None
            else self._outcome(
                clip,
                row.get("clip_id") or "",
                images[clip.first : clip.first + len(clip.shown)],
                None if clip.text is None else text_answers[clip.text],
                judged[clip.first : clip.first + len(clip.shown)],
            )
            for row, clip in zip(batch, asked, strict=True)
        ]

    @property
    def _needs_no_text(self) -> bool:
        return self.config.embeddings or self._head is not None

    def _outcome(
        self,
        clip: _Clip,
        clip_id: str,
        images: Sequence[np.ndarray | Failure],
        text: np.ndarray | Failure | None,
        judged: Sequence[np.ndarray | Failure],
    ) -> Outcome:
        """Returns what becomes of one row.

        Args:
            clip: Which frames its pictures are.
            clip_id: For the log.
            images: The scorer's answer for each picture.
            text: Its answer for the caption, None without one.
            judged: Answer for each picture by the CLIP whose embeddings are judged.
        """
        for answer in images:
            if isinstance(answer, Failure) and answer.reason == BAD_FRAMES:
                return Drop(BAD_FRAMES, answer.detail)
        columns: Row = {"clip_score": None, "clip_score_frame": None}
        wrote: list[dict[str, str | None]] = []

        def write(
            name: str, value: object, author: tuple[str, str], failed: Failure | None
        ) -> None:
            columns[name] = value
            note = failed.note if failed else None
            wrote.append(provenance(name, *author, note=note))
            if failed:
                logger.warning("No %s of %s: %s", name, clip_id, failed)

        by = (self._scorer.model, self._scorer.revision)
        image_FD, failed_images = _vectors(images)
        text_1D, failed_text = _vectors([] if text is None else [text])
        if text is not None:
            failed = failed_images or failed_text
            cosines = None if failed else np.clip(image_FD @ text_1D[0], -1.0, 1.0)
            even = None if cosines is None else float(cosines[list(clip.even)].mean())
            write("clip_score", even, by, failed)
            one = None if cosines is None else float(cosines[clip.drawn])
            write("clip_score_frame", one, by, failed)
        if self.config.embeddings:
            mean = None if failed_images else unit(image_FD[list(clip.even)].mean(axis=0))
            write("clip_image_embedding", _half(mean), by, failed_images)
            if text is not None:
                write(
                    "clip_text_embedding",
                    _half(text_1D[0] if not failed_text else None),
                    by,
                    failed_text,
                )
        if self._head is not None:
            seen_FD, failed = _vectors(judged)
            best = None if failed else float(self._head.score(seen_FD[list(clip.even)]).max())
            author = (f"{self._head.name}+{self._judged.model}", self._head.sha256[:16])
            write("aesthetic_score", best, author, failed)
        return Kept((columns | {"provenance": wrote},))


def _vectors(answers: Sequence[np.ndarray | Failure]) -> tuple[np.ndarray, Failure | None]:
    """Returns the embeddings [F, D], or the first failure among them."""
    good = []
    for answer in answers:
        if isinstance(answer, Failure):
            return np.empty((0, 0), np.float32), answer
        good.append(answer)
    return (np.stack(good) if good else np.empty((0, 0), np.float32)), None


def _half(vector: np.ndarray | None) -> list[float] | None:
    """Returns a vector rounded to float16, as plain numbers."""
    return None if vector is None else vector.astype(np.float16).tolist()
