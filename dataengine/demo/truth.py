# SPDX-License-Identifier: Apache-2.0
"""What is true of a rendered demo video, as plain values for ``truth.json``.

All times are milliseconds from the container's start, spans half-open.
"""

from typing import Any

import cv2
import numpy as np

from dataengine.demo.backgrounds import Picture
from dataengine.demo.describe import describe_background, describe_shot, describe_sound
from dataengine.demo.draw import ShotPainter, VideoPainter
from dataengine.demo.scene import Plan, Shot, Sound, Thing
from dataengine.demo.sound import SPEECH_DELAY_MS, Wave, level_dbfs

_DARK_LUMA, _BRIGHT_LUMA = 75, 165
_ROUGH = 4.0
"""Mean absolute Laplacian of luma above which a background is called rough (measured: gradients,
clouds and waves stay below 3; grain, skylines and fine dots mostly lie above)."""


def video_truth(
    plan: Plan,
    painter: VideoPainter,
    sounds: list[Sound],
    waves: list[Wave],
    lead_ms: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Returns everything known about a video.

    Args:
        plan: What was drawn.
        painter: Gives the pictures of shots, to measure and locate objects.
        sounds: What is heard, in order.
        waves: The samples of each sound.
        lead_ms: When, after the container's start, the first frame is shown.
        rng: Words the captions; advanced.
    """
    voiced = {}
    heard = []
    for sound, wave in zip(sounds, waves, strict=True):
        heard.append(_sound_truth(sound, wave, lead_ms, plan.sample_rate))
        if sound.kind == "speech":
            voiced[sound.end_ms] = heard[-1]["speech"]
    shots = []
    for number, shot in enumerate(plan.shots):
        shot_truth = _shot_truth(plan, shot, painter.painter(number), lead_ms, rng)
        shots.append(shot_truth | {"speech": voiced.get(plan.ms(shot.end))})
    return {
        "duration_ms": plan.ms(plan.num_ticks) + lead_ms,
        "fps": plan.rate,
        "width": plan.width,
        "height": plan.height,
        "num_frames": len(plan.ticks),
        "trait": plan.trait or None,
        "has_audio": plan.has_audio,
        "shots": shots,
        "transitions": [
            {
                "kind": change.kind,
                "start_ms": plan.ms(change.start) + lead_ms,
                "end_ms": plan.ms(change.end) + lead_ms,
                "cut_ms": plan.ms(change.cut) + lead_ms,
            }
            for change in plan.transitions
        ],
        "sounds": heard,
        "subtitles": {
            language: [
                {"start_ms": c.start_ms + lead_ms, "end_ms": c.end_ms + lead_ms, "text": c.text}
                for c in cues
            ]
            for language, cues in plan.subtitles.items()
        },
    }


def _shot_truth(
    plan: Plan, shot: Shot, painter: ShotPainter, lead_ms: int, rng: np.random.Generator
) -> dict[str, Any]:
    background = shot.background
    left, top = painter.margin
    seen = painter.background[top : top + plan.height, left : left + plan.width]
    luma, roughness = measure(seen)
    brightness = "dark" if luma < _DARK_LUMA else "bright" if luma > _BRIGHT_LUMA else "medium"
    middle = (shot.start + shot.end) // 2
    colours = background.colours[: 1 if background.kind in ("plain", "starry") else 2]
    return {
        "start_ms": plan.ms(shot.start) + lead_ms,
        "end_ms": plan.ms(shot.end) + lead_ms,
        "caption": describe_shot(shot, brightness, rng),
        "still": shot.still,
        "strobe": bool(shot.strobe_hz),
        "camera": shot.camera,
        "background": {
            "kind": background.kind,
            "colours": list(colours),
            "shade": background.shade or None,
            "phrase": describe_background(background),
            "brightness": brightness,
            "mean_luma": round(luma, 1),
            "texture": "rough" if roughness > _ROUGH else "smooth",
            "roughness": round(roughness, 1),
        },
        "middle_ms": plan.ms(middle) + lead_ms,
        "objects": [_thing_truth(thing, painter, middle) for thing in shot.things],
    }


def _thing_truth(thing: Thing, painter: ShotPainter, tick: int) -> dict[str, Any]:
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "rgb": list(thing.rgb),
        "size": thing.size,
        "diameter_px": round(thing.diameter),
        "action": thing.action,
        "middle_box_px": list(painter.box(thing, tick)),
    }


def _sound_truth(sound: Sound, wave: Wave, lead_ms: int, sample_rate: int) -> dict[str, Any]:
    speech = None
    if sound.kind == "speech":
        start_ms = sound.start_ms + SPEECH_DELAY_MS + lead_ms
        # Samples are exactly zero before and after the words.
        num_silent = len(wave) - int(np.flatnonzero(wave)[-1]) - 1
        end_ms = sound.end_ms + lead_ms - num_silent * 1000 // sample_rate
        speech = {
            "text": sound.text,
            "voice": sound.voice,
            "language": "en",
            "start_ms": start_ms,
            "end_ms": end_ms,
        }
    return {
        "kind": sound.kind,
        "start_ms": sound.start_ms + lead_ms,
        "end_ms": sound.end_ms + lead_ms,
        "loudness": None if sound.kind == "silence" else sound.loudness,
        "level_dbfs": level_dbfs(wave),
        "caption": describe_sound(sound),
        "parameters": sound.values,
        "speech": speech,
    }


def measure(picture: Picture) -> tuple[float, float]:
    """Returns the mean luma (0..255) and the mean absolute Laplacian of luma of a picture."""
    luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return float(luma.mean()), float(np.abs(cv2.Laplacian(luma, cv2.CV_32F)).mean())
