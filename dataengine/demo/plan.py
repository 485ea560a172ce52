# SPDX-License-Identifier: Apache-2.0
"""(seed, index) -> Plan: what each demo video will show, decided without drawing it."""

from itertools import pairwise

import numpy as np

from dataengine.demo.decks import PERIOD, Decks, Role, schedule
from dataengine.demo.scene import Plan, Shot, Transition
from dataengine.demo.shots import plan_shot
from dataengine.demo.soundtrack import plan_sounds, plan_subtitles

_SIZES = ((320, 240), (426, 240), (240, 320), (352, 288), (256, 256), (424, 240), (240, 426))
_RATES = (24, 25, 30)
_MIN_S, _MAX_S = 12.0, 25.0
_SHOT_MIN_S = 2.0


def plan_video(seed: int, index: int) -> Plan:
    """Returns the plan of video ``index``; the same whatever the size of the demo."""
    roles = schedule(seed)
    cycle, position = divmod(index, PERIOD)
    role = roles[position]
    number = cycle * sum(r.num_shots for r in roles) + sum(r.num_shots for r in roles[:position])
    decks = Decks(seed)
    rng = np.random.default_rng([seed, index])
    size = decks.draw("size", _SIZES, index)
    rate = decks.draw("rate", _RATES, index)

    cuts = _cuts(role, rate, rng)
    transitions = _transitions(role, cuts, rate, rng)
    moods = _moods(role, transitions, rng)
    shots: list[Shot] = []
    for i in range(role.num_shots):
        shots.append(
            plan_shot(
                decks,
                number + i,
                _ticks_seen(i, cuts, transitions),
                size,
                rate,
                moods[i],
                shots[-1].background if shots else None,
                rng,
            )
        )
    spans_ms = [(round(1000 * shot.start / rate), round(1000 * shot.end / rate)) for shot in shots]
    sounds = plan_sounds(decks, number, spans_ms, role.speaks, rng) if role.has_audio else ()
    return Plan(
        index=index,
        width=size[0],
        height=size[1],
        rate=rate,
        ticks=_variable_ticks(cuts, rng) if role.trait == "vfr" else tuple(range(cuts[-1])),
        num_ticks=cuts[-1],
        trait=role.trait,
        has_audio=role.has_audio,
        sample_rate=int(rng.choice([44100, 48000])),
        keyframe_ticks=rate * int(rng.choice([2, 4, 10])),
        shots=tuple(shots),
        transitions=transitions,
        sounds=sounds,
        subtitles=plan_subtitles(seed, cycle, role, spans_ms, sounds, rng),
    )


def _cuts(role: Role, rate: int, rng: np.random.Generator) -> list[int]:
    """Returns the ticks at which shots begin, and the end of the last."""
    shot_s = rng.uniform(3.7, 4.6) if role.speaks else rng.uniform(2.6, 4.0)
    total_s = np.clip(role.num_shots * shot_s, _MIN_S, _MAX_S)
    shares = rng.uniform(0.7, 1.3, role.num_shots)
    lengths_s = np.maximum(shares / shares.sum() * total_s, _SHOT_MIN_S)
    return [0, *np.cumsum(np.round(lengths_s * rate).astype(int)).tolist()]


def _transitions(
    role: Role, cuts: list[int], rate: int, rng: np.random.Generator
) -> tuple[Transition, ...]:
    """Returns one transition per inner cut, the role's odd ones at random places."""
    places = rng.permutation(role.num_shots - 1).tolist()
    kinds = dict(zip(places, role.changes, strict=False))
    transitions = []
    for place, cut in enumerate(cuts[1:-1]):
        kind = kinds.get(place, "cut")
        half = 0
        if kind != "cut":
            # A faster blend would look like a cut to a detector, and to a person.
            half = round(rate * (rng.uniform(0.3, 0.5) if kind == "dissolve" else 0.5))
        transitions.append(Transition(kind, cut - half, cut, cut + half))
    return tuple(transitions)


def _moods(role: Role, transitions: tuple[Transition, ...], rng: np.random.Generator) -> list[str]:
    """Returns "", "still" or "strobe" for each shot; these begin and end with a hard cut."""
    moods = [""] * role.num_shots
    hard = [True, *(t.kind == "cut" for t in transitions), True]
    clean = [i for i in range(role.num_shots) if hard[i] and hard[i + 1]]
    if role.strobes or role.rests:
        moods[clean[int(rng.integers(len(clean)))]] = "strobe" if role.strobes else "still"
    return moods


def _ticks_seen(
    i: int, cuts: list[int], transitions: tuple[Transition, ...]
) -> tuple[int, int, int, int]:
    """Returns first, start, end, last of shot i: what it shares with a dissolve is seen too."""
    first, last = cuts[i], cuts[i + 1]
    if i and transitions[i - 1].kind == "dissolve":
        first = transitions[i - 1].start
    if i < len(transitions) and transitions[i].kind == "dissolve":
        last = transitions[i].end
    return first, cuts[i], cuts[i + 1], last


def _variable_ticks(cuts: list[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Returns the ticks that become frames of a video of variable rate.

    Some shots keep all, some every other one, some lose a fifth at random. A shot's first frame
    always stays, so cuts keep their times; so does the last of all, so the duration does.
    """
    keep = np.ones(cuts[-1], bool)
    for i, (start, end) in enumerate(pairwise(cuts)):
        if i % 3 == 1:
            keep[start + 1 : end : 2] = False
        elif i % 3 == 2:
            keep[start:end] &= rng.random(end - start) > 0.2
        keep[start] = True
    keep[-1] = True
    return tuple(np.flatnonzero(keep).tolist())
