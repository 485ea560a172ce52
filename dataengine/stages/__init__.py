# SPDX-License-Identifier: Apache-2.0
"""The rooms of the corridor, in order: the table of contents of the engine."""

from dataengine.stage import Stage
from dataengine.stages.caption_audio import CaptionAudioStage
from dataengine.stages.caption_video import CaptionVideoStage
from dataengine.stages.clip import ClipStage
from dataengine.stages.download import DownloadStage
from dataengine.stages.fuse import FuseStage
from dataengine.stages.identify_language import IdentifyLanguageStage
from dataengine.stages.score import ScoreStage
from dataengine.stages.score_video_text import ScoreVideoTextStage
from dataengine.stages.segment import SegmentStage
from dataengine.stages.transcribe import TranscribeStage
from dataengine.stages.translate import TranslateStage

STAGES: dict[str, type[Stage]] = {
    "download": DownloadStage,
    "segment": SegmentStage,
    "clip": ClipStage,
    "caption_video": CaptionVideoStage,
    "caption_audio": CaptionAudioStage,
    "transcribe": TranscribeStage,
    "identify_language": IdentifyLanguageStage,
    "translate": TranslateStage,
    "fuse": FuseStage,
    "score": ScoreStage,
    "score_video_text": ScoreVideoTextStage,
}
"""Name in a pipeline file -> stage class."""
