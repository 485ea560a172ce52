# SPDX-License-Identifier: Apache-2.0
"""Plain English sentences for what a shot shows and what a span sounds like."""

import numpy as np

from dataengine.demo.scene import SCENES, STAYS, Background, Shot, Sound, Thing

_VERBS: dict[str, tuple[str, ...]] = {
    "moves left": ("moves to the left", "slides left", "travels from right to left"),
    "moves right": ("moves to the right", "slides right", "travels from left to right"),
    "moves up": ("moves up", "rises slowly", "climbs towards the top"),
    "moves down": ("moves down", "sinks slowly", "comes down from the top"),
    "grows": ("grows", "gets bigger", "becomes larger and larger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller and smaller"),
    "rotates": ("rotates", "turns around itself", "spins slowly"),
    "bounces": ("bounces up and down", "bounces", "jumps up and down"),
    "blinks": ("blinks", "appears and disappears", "fades in and out again and again"),
    "orbits": ("moves in a circle", "goes round and round in a circle", "travels in circles"),
}
_CAMERA: dict[str, tuple[str, ...]] = {
    "pan left": ("the camera pans to the left", "the view moves left"),
    "pan right": ("the camera pans to the right", "the view moves right"),
    "zoom in": ("the camera zooms in", "the view slowly gets closer"),
    "zoom out": ("the camera zooms out", "the view slowly draws back"),
}
_SIZES = {
    "small": ("small", "little", "small"),
    "medium": ("", "medium-sized", ""),
    "large": ("large", "big", "large"),
}


def describe_shot(shot: Shot, brightness: str, rng: np.random.Generator) -> str:
    """Returns one sentence about a shot.

    Args:
        shot: The shot.
        brightness: Of the background: "dark", "medium" or "bright".
        rng: Chooses among ways to say the same; advanced.
    """
    ground = describe_background(shot.background)
    moving = [thing for thing in shot.things if thing.action != STAYS]
    resting = [thing for thing in shot.things if thing.action == STAYS]
    place = f"{_preposition(shot.background, rng)} {ground}"
    if shot.strobe_hz:
        flash = _pick(("The light flashes on and off", "Bright light flickers rapidly"), rng)
        return f"{flash} over {_list(shot.things, rng)} {place}."
    if moving:
        clauses = [f"{_name(thing, rng)} {_pick(_VERBS[thing.action], rng)}" for thing in moving]
        subject = ", ".join(clauses[:-1])
        subject += f" {_pick(('while', 'and'), rng)} {clauses[-1]}" if subject else clauses[-1]
        if resting:
            subject += f" {_pick(('next to', 'beside'), rng)} {_list(resting, rng)}"
    elif shot.camera == "still":
        opening = ("a still picture of", "a motionless view of", "a static shot of")
        subject = f"{_pick(opening, rng)} {_list(resting, rng)}"
    else:
        verb = "rests" if len(resting) == 1 else "rest"
        subject = f"{_list(resting, rng)} {verb}"
    mood = ""
    if brightness != "medium" and not shot.background.shade and rng.random() < 0.3:
        mood = f"in a {brightness} scene, "
    if shot.camera != "still":
        camera = _pick(_CAMERA[shot.camera], rng)
        forms = (f"{mood}{subject} {place} as {camera}", f"{camera} while {subject} {place}")
    elif moving:
        forms = (f"{mood}{subject} {place}", f"{mood}{subject} {place}", f"{place}, {subject}")
    else:
        forms = (f"{mood}{subject} {place}",)
    sentence = _pick(forms, rng)
    return f"{sentence[0].upper()}{sentence[1:]}."


def describe_background(background: Background) -> str:
    """Returns a noun phrase for a background, with its article."""
    first, second = (f"{background.shade} {name}".strip() for name in background.colours)
    kind = background.kind
    if kind == "plain":
        return f"a plain {first} background"
    if kind == "gradient":
        start, end = (second, first)  # the mask of the first colour rises to the right or bottom
        ways = {"horizontal": "from top to bottom", "vertical": "from left to right"}
        way = ways.get(background.direction, "")
        return f"a background that fades from {start} to {end} {way}".rstrip()
    if kind == "striped":
        return f"{background.direction} {first} and {second} stripes"
    if kind == "dotted":
        return f"{_a(first)} background with {second} dots"
    if kind == "mountains":
        return f"{second} mountains under {_a(first)} sky"
    if kind == "sea":
        return f"{_a(second)} sea under {_a(first)} sky"
    if kind == "city":
        return f"{_a(second)} city skyline under {_a(first)} sky"
    if kind == "starry":
        return f"{_a(first)} sky full of stars"
    return f"{_a(first)} and {second} {kind} background"


def describe_sound(sound: Sound) -> str:
    """Returns a noun phrase or short sentence for a sound."""
    values, how = sound.values, {"medium": ""}.get(sound.loudness, sound.loudness)
    if sound.kind == "silence":
        return "There is no sound."
    if sound.kind == "speech":
        who = "woman" if sound.voice == "slt" else "man"
        return f"A {who} speaks English."
    if sound.kind == "tone":
        pitch = values["pitch_hz"]
        assert isinstance(pitch, float)
        height = "low" if pitch < 200 else "high" if pitch > 800 else "steady"
        text = f"{height} tone"
    elif sound.kind == "chord":
        text = f"held {values['chord']} chord"
    elif sound.kind == "melody":
        text = "melody of plucked notes"
    elif sound.kind == "noise":
        text = {"white": "hiss", "pink": "rushing noise", "brown": "deep rumble"}[
            str(values["noise"])
        ]
    else:
        text = f"steady beat of {values['drum']} at {values['bpm']:.0f} beats per minute"
    phrase = _a(f"{how} {text}".strip())
    return f"{phrase[0].upper()}{phrase[1:]}."


def _preposition(background: Background, rng: np.random.Generator) -> str:
    if background.kind == "sea":
        return _pick(("over", "above"), rng)
    if background.kind in SCENES:
        return _pick(("in front of", "before", "against"), rng)
    return _pick(("over", "on", "against", "in front of"), rng)


def _name(thing: Thing, rng: np.random.Generator) -> str:
    size = "" if thing.action in ("grows", "shrinks") else _pick(_SIZES[thing.size], rng)
    return _a(f"{size} {thing.colour} {thing.shape}".strip())


def _list(things: list[Thing] | tuple[Thing, ...], rng: np.random.Generator) -> str:
    names = [_name(thing, rng) for thing in things]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
