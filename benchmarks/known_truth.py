# SPDX-License-Identifier: Apache-2.0
"""How much of what is known to be in demo videos the annotations of a corpus say, and how often they err.

``python benchmarks/known_truth.py`` makes demo videos, brings them in by the quickstart and compares;
``--videos DIR --corpus CORPUS`` compares what is there already. It prints Markdown tables and one
line of JSON; ``--write docs/quality.md`` puts the tables between two marks of that page.

A clip is asked for what the shot that fills most of it shows, and for the sound that fills most of
it (recall). It may name what any shot or sound shows that is in it for `LEAST_MS` (precision). What
counts as naming is the table `WORDS`, and nothing else.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from benchmarks.clip_auc import score_pairs
from dataengine.corpus import Corpus
from dataengine.demo import render_demo
from dataengine.demo.scene import COLOURS, STAYS
from dataengine.errors import ConfigError
from dataengine.models.clip import OpenClipConfig, build_clip_scorer

LEAST_MS = 200
BEGIN, END = "<!-- known truth -->", "<!-- /known truth -->"
ROOT = Path(__file__).parent.parent

_GO = r"(?<!view )(?<!camera )(?:moves?|moving|slides?|sliding|travels?|drifts?|goes)"
_WAY = rf"{_GO} (?:\w+ and )?"
_PAN = r"(?:camera|view) (?:\w+ (?:\w+ )?and )?"

WORDS: Mapping[str, Mapping[str, str]] = {
    "colour": {name: rf"{name}(?:ish)?" for name in COLOURS} | {"grey": "gr[ea]y"},
    "shape": {
        "circle": r"(?<!in a )circle|disc|disk|ball|dot",
        "square": "square",
        "triangle": "triangle",
        "star": "star",
        "ring": "ring|hoop|doughnut|donut",
        "cross": "cross|plus sign",
        "diamond": "diamond|rhombus",
        "heart": "heart",
        "hexagon": "hexagon",
        "crescent": "crescent|moon",
        "rectangle": "rectangle|oval|ellipse|pentagon|octagon",  # never drawn as objects
    },
    "action": {
        "moves left": rf"{_WAY}(?:to the )?left|{_GO} from right to left",
        "moves right": rf"{_WAY}(?:to the )?right|{_GO} from left to right",
        "moves up": rf"{_GO} up(?! and down)|rises|climbs",
        "moves down": rf"{_GO} down|sinks|falls|comes down",
        "grows": "grows|gets bigger|gets larger|becomes larger",
        "shrinks": "shrinks|gets smaller|becomes smaller",
        "rotates": "rotates|spins|turns around",
        "bounces": "bounces|(?:moves|jumps) up and down",
        "blinks": "blinks|flashes|appears and disappears|fades in and out",
        # "moves about" is less than a circle, but true of one.
        "orbits": "orbits|circles around|in circles|in a circle|moves about",
        "sways": "back and forth",  # nothing drawn does
    },
    "camera": {
        "pan left": rf"{_PAN}(?:pans|moves) (?:to the )?left",
        "pan right": rf"{_PAN}(?:pans|moves) (?:to the )?right",
        "zoom in": r"zooms in|gets closer",
        "zoom out": r"zooms out|draws back",
        "tilt": r"tilts (?:up|down)",  # never done
    },
    "stillness": {"nothing moves": r"nothing moves|motionless|static shot|still picture"},
    "light": {
        "dark": "dark",
        "bright": "bright(?! light)",
        "flashing": r"flickers?|flashes|strobes?",
    },
    "background": {
        "plain": "plain",
        "gradient": "gradient|fades from",
        "checkered": "checkere?d|chequered|checkerboard",
        "striped": "striped?|stripes",
        "cloudy": "cloudy|blotchy|soft",
        "grainy": "grainy|noisy",
        "dotted": "dotted|dots",
        "mountains": "mountains?|hills?",
        "sea": "sea|ocean|water",
        "city": "city|skyline|buildings|houses",
        "starry": "starry|full of stars",
    },
    "sound": {
        "silence": r"silence(?! in between)|silent|no sound",
        "speech": r"voice|speaks|speech|talks",
        "tone": "tone|beep",
        "music": "music(?:-like)?|melody|chord",
        "noise": r"noise|hiss(?:ing)?|rumbl\w+|rushing",
        "rhythm": r"beat|beats|clicks|drums?|rhythmic",
    },
    "loudness": {"quiet": "quiet|faint|soft", "loud": "loud"},
}
"""Kind -> what is true -> the words that say so, as a regular expression that whole words must match."""

_SOUNDS = {"chord": "music", "melody": "music"}
_ALSO_TRUE = {"melody": {"rhythm"}}
"""Of a melody in even notes one may say that it has a beat."""


# -------------------------------------------------------------------------------------- counting


@dataclass(slots=True)
class Tally:
    """How often something was there, was named, and both.

    Attributes:
        wanted: Things that are there, clip by clip.
        found: Those of them that are named.
        named: Things named, clip by clip.
        right: Those of them that are there.
        missed: Thing -> how often it was not named.
        there: Thing -> how often it was there.
        wrong: Thing -> how often it was named without being there.
    """

    wanted: int = 0
    found: int = 0
    named: int = 0
    right: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    there: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, wanted: set[str], allowed: set[str], named: set[str]) -> None:
        """Counts one clip."""
        self.wanted += len(wanted)
        self.found += len(wanted & named)
        self.named += len(named)
        self.right += len(named & (allowed | wanted))
        self.there.update(wanted)
        self.missed.update(wanted - named)
        self.wrong.update(named - allowed - wanted)

    @property
    def recall(self) -> float | None:
        """Returns the share of what is there that is named; None where nothing is."""
        return self.found / self.wanted if self.wanted else None

    @property
    def precision(self) -> float | None:
        """Returns the share of what is named that is there; None where nothing is."""
        return self.right / self.named if self.named else None


@cache
def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


def named(kind: str, text: str | None) -> set[str]:
    """Returns what of a kind a text names."""
    return {what for what, words in WORDS[kind].items() if text and _pattern(words).search(text)}


def named_objects(text: str | None) -> set[str]:
    """Returns the objects that a text names by colour and shape, ``red circle``."""
    return {
        f"{colour} {shape}"
        for colour, colour_words in WORDS["colour"].items()
        for shape, shape_words in WORDS["shape"].items()
        if text and _pattern(rf"(?:{colour_words}) (?:{shape_words})").search(text)
    }


# ----------------------------------------------------------------------------------------- truth


def _shared_ms(span: Mapping[str, Any], clip: Mapping[str, Any]) -> int:
    return min(span["end_ms"], clip["end_ms"]) - max(span["start_ms"], clip["start_ms"])


def inside(spans: Iterable[Mapping[str, Any]], clip: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the spans that are in a clip for `LEAST_MS` or as a whole, the longest part first."""
    found = [
        span
        for span in spans
        if _shared_ms(span, clip) >= min(LEAST_MS, span["end_ms"] - span["start_ms"])
    ]
    return sorted(found, key=lambda span: -_shared_ms(span, clip))


def shot_facts(shot: Mapping[str, Any]) -> dict[str, set[str]]:
    """Returns kind -> what is true of a shot of ``truth.json``."""
    objects, ground = shot["objects"], shot["background"]
    light = {"flashing"} if shot["strobe"] else {ground["brightness"]} - {"medium"}
    camera = {shot["camera"]} - {"still"}
    return {
        "object": {f"{thing['colour']} {thing['shape']}" for thing in objects},
        "shape": {thing["shape"] for thing in objects},
        "object colour": {thing["colour"] for thing in objects},
        "background colour": set(ground["colours"]),
        "action": {thing["action"] for thing in objects} - {STAYS},
        "camera": camera,
        "stillness": {"nothing moves"} if shot["still"] else set(),
        "light": light,
        "background": {ground["kind"]},
    }


def _visible(shots: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Returns kind -> what may be said of a clip that shows these shots."""
    allowed: dict[str, set[str]] = {}
    for shot in shots:
        for kind, facts in shot_facts(shot).items():
            allowed.setdefault(kind, set()).update(facts)
        if not shot["strobe"] and all(thing["action"] == STAYS for thing in shot["objects"]):
            allowed["stillness"].add("nothing moves")  # the camera may
    return allowed


def compare_captions(
    rows: Sequence[Mapping[str, Any]], truths: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tally]:
    """Returns kind -> how captions compare with the truth.

    Args:
        rows: Clips: video_id, start_ms, end_ms, caption_video, caption_audio.
        truths: video_id -> a video of ``truth.json``.
    """
    tallies: dict[str, Tally] = {
        kind: Tally()
        for kind in (
            *("object", "shape", "object colour", "background colour", "action", "camera"),
            *("stillness", "light", "background", "sound", "loudness", "speech"),
        )
    }
    for row in rows:
        truth = truths[row["video_id"]]
        shots = inside(truth["shots"], row)
        text = row["caption_video"]
        if shots:
            wanted, allowed = shot_facts(shots[0]), _visible(shots)
            colours = allowed["object colour"] | allowed["background colour"]
            for kind, facts in wanted.items():
                match kind:
                    case "object":
                        tallies[kind].add(facts, allowed[kind], named_objects(text))
                    case "object colour" | "background colour":
                        # A text does not always say what a colour is of: both allow all.
                        tallies[kind].add(facts, colours, named("colour", text))
                    case "shape":
                        # The stars of a sky are none of the objects.
                        said = named(kind, re.sub("stars|dots", "", text or ""))
                        tallies[kind].add(facts, allowed[kind], said)
                    case _:
                        tallies[kind].add(facts, allowed[kind], named(kind, text))
        _compare_sound(row, truth, tallies)
    return tallies


def _compare_sound(
    row: Mapping[str, Any], truth: Mapping[str, Any], tallies: Mapping[str, Tally]
) -> None:
    sounds = inside(truth["sounds"], row)
    kinds = [str(_SOUNDS.get(sound["kind"], sound["kind"])) for sound in sounds]
    also: set[str] = set().union(*(_ALSO_TRUE.get(sound["kind"], set()) for sound in sounds))
    said = named("sound", row["caption_audio"])
    if sounds:
        tallies["sound"].add(set(kinds[:1]), set(kinds) | also, said)
        loud = [{str(sound["loudness"])} & {"quiet", "loud"} for sound in sounds]
        named_loud = named("loudness", row["caption_audio"])
        tallies["loudness"].add(loud[0], set().union(*loud), named_loud)
    spoken = {"speech"} if "speech" in kinds else set()
    whole = {"speech"} if spoken_text(truth, row) else set()
    tallies["speech"].add(whole, spoken, said & {"speech"})


# ---------------------------------------------------------------------------- speech and language


def spoken_text(truth: Mapping[str, Any], clip: Mapping[str, Any]) -> str | None:
    """Returns what is said in a clip; None if nothing is, empty if a sentence is cut off."""
    texts = []
    for sound in truth["sounds"]:
        speech = sound["speech"]
        if speech is None or _shared_ms(speech, clip) <= 0:
            continue
        if _shared_ms(speech, clip) < 0.95 * (speech["end_ms"] - speech["start_ms"]):
            return ""
        texts.append(speech["text"])
    return " ".join(texts) or None


def plain_words(text: str | None) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"[\w']+", (text or "").lower())


def word_errors(reference: str, hypothesis: str | None) -> tuple[int, int]:
    """Returns how many words must be changed, added or taken away, and how many were said."""
    said = plain_words(reference)
    return Levenshtein.distance(said, plain_words(hypothesis)), len(said)


@dataclass(slots=True)
class Heard:
    """Speech of one voice.

    Attributes:
        clips: Clips in which it says whole sentences.
        transcribed: Those with a transcript.
        words: Words said in those with a transcript.
        errors: Words wrong there.
    """

    clips: int = 0
    transcribed: int = 0
    words: int = 0
    errors: int = 0

    @property
    def wer(self) -> float | None:
        """Returns the word error rate of what was transcribed."""
        return self.errors / self.words if self.words else None


@dataclass(slots=True)
class SpeechResult:
    """How transcripts compare with what was said.

    Attributes:
        voices: Voice -> what a recogniser made of it.
        subtitled: The same where the transcript was cut from subtitles.
        cut_off: Clips left out since a sentence is cut off in them.
        silent: Clips in which nobody speaks and no subtitles stand.
        made_up: Those of them with a transcript.
    """

    voices: dict[str, Heard] = field(default_factory=dict)
    subtitled: Heard = field(default_factory=Heard)
    cut_off: int = 0
    silent: int = 0
    made_up: int = 0


def transcript_model(row: Mapping[str, Any]) -> str:
    """Returns who wrote a clip's transcript, empty if nobody did."""
    entries = [e for e in row.get("provenance") or () if e["column"] == "transcript"]
    return entries[0]["model"] if entries and row["transcript"] else ""


def compare_speech(
    rows: Sequence[Mapping[str, Any]], truths: Mapping[str, Mapping[str, Any]]
) -> SpeechResult:
    """Returns how transcripts compare with what was said.

    Translated subtitles of what nobody says are no speech; they are left out.
    """
    result = SpeechResult()
    for row in rows:
        truth = truths[row["video_id"]]
        text, model = spoken_text(truth, row), transcript_model(row)
        from_subtitles = model.startswith("subtitles")
        if text is None:
            if not from_subtitles:
                result.silent += 1
                result.made_up += bool(model)
            continue
        if not text:
            result.cut_off += 1
            continue
        speeches = [s["speech"] for s in truth["sounds"] if s["speech"]]
        voice = next(s["voice"] for s in speeches if _shared_ms(s, row) > 0)
        heard = result.subtitled if from_subtitles else result.voices.setdefault(voice, Heard())
        heard.clips += 1
        if model:
            errors, words = word_errors(text, row["transcript"])
            heard.transcribed += 1
            heard.errors += errors
            heard.words += words
    return result


def compare_languages(
    rows: Sequence[Mapping[str, Any]], truths: Mapping[str, Mapping[str, Any]]
) -> dict[str, Counter[tuple[str, str]]]:
    """Returns how clips got their transcript -> (true language, the one named) -> clips.

    The true language is that of the subtitles whose text the transcript holds, else of the speech.
    """
    found: dict[str, Counter[tuple[str, str]]] = {"subtitles": Counter(), "recognised": Counter()}
    for row in rows:
        truth, model = truths[row["video_id"]], transcript_model(row)
        if not model:
            continue
        if model.startswith("subtitles"):
            true = next(
                (
                    language
                    for language, cues in truth["subtitles"].items()
                    if any(cue["text"] in row["transcript"] for cue in inside(cues, row))
                ),
                None,
            )
            if true:
                found["subtitles"][true, row["language"] or "none"] += 1
        elif spoken_text(truth, row):
            found["recognised"]["en", row["language"] or "none"] += 1
    return found


# ---------------------------------------------------------------------------------------- report


def load_truths(corpus: Corpus, truth_file: Path) -> dict[str, dict[str, Any]]:
    """Returns video_id -> truth of the corpus's videos that a ``truth.json`` knows.

    Raises:
        ConfigError: If there is none, or it knows none of them.
    """
    try:
        videos = json.loads(truth_file.read_text(encoding="utf-8"))["videos"]
    except FileNotFoundError:
        raise ConfigError(
            f"No truth: {truth_file}", "name the folder that dataengine demo wrote"
        ) from None
    sources = corpus.videos(["source", "video_id"]).to_pylist()
    truths = {
        row["video_id"]: videos[name]
        for row in sources
        if (name := row["source"].rsplit("/", 1)[-1]) in videos
    }
    if not truths:
        raise ConfigError(f"{truth_file} knows none of the videos of {corpus.root}")
    return truths


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}".replace("%", " %")


def _few(counts: Counter[str], of: Counter[str] | None = None) -> str:
    """Returns the three most frequent, as ``name 3/4`` or ``name 3``."""
    ranked = sorted(counts, key=lambda name: (-counts[name], name))[:3]
    return ", ".join(f"{name} {counts[name]}" + (f"/{of[name]}" if of else "") for name in ranked)


_COLUMN = {"sound": "caption_audio", "loudness": "caption_audio", "speech": "caption_audio"}
_TITLE = {"object": "object (colour and shape)"}


def caption_table(tallies: Mapping[str, Tally]) -> str:
    """Returns the Markdown table of captions."""
    lines = [
        "| what | column | there | recall | named | precision | missed most | named wrongly |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, tally in tallies.items():
        column = _COLUMN.get(kind, "caption_video")
        cells = (
            *(_TITLE.get(kind, kind), f"`{column}`", str(tally.wanted), _percent(tally.recall)),
            *(str(tally.named), _percent(tally.precision)),
            *(_few(tally.missed, tally.there) or "-", _few(tally.wrong) or "-"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_table(speech: SpeechResult, languages: Mapping[str, Counter[tuple[str, str]]]) -> str:
    """Returns the Markdown table of transcripts and languages."""
    lines = ["| transcripts and languages | clips | result |", "|---|---|---|"]
    rows = [(f"recognised speech, voice {v}", h) for v, h in sorted(speech.voices.items())]
    for title, heard in [*rows, ("speech with subtitles", speech.subtitled)]:
        if heard.clips:
            missing = heard.clips - heard.transcribed
            result = f"word error rate {_percent(heard.wer)} of {heard.words} words"
            lines.append(f"| {title} | {heard.clips} | {result}; {missing} not transcribed |")
    if speech.cut_off:
        lines.append(f"| a sentence cut off by the clip's ends | {speech.cut_off} | left out |")
    lines.append(f"| nobody speaks | {speech.silent} | {speech.made_up} transcribed all the same |")
    for how, pairs in languages.items():
        total = sum(pairs.values())
        right = sum(number for (true, said), number in pairs.items() if true == said)
        wrong = [
            f"{true} as {said} {n}" for (true, said), n in sorted(pairs.items()) if true != said
        ]
        count = f"{len({true for true, _ in pairs})} languages" if how == "subtitles" else "English"
        if total:
            result = f"{_percent(right / total)} right" + f"; {', '.join(wrong)}" * bool(wrong)
            lines.append(f"| language, {how} ({count}) | {total} | {result} |")
    return "\n".join(lines)


def score_table(scores: Mapping[str, float]) -> str:
    """Returns the Markdown table of CLIP scores."""
    return (
        "| CLIP score | own caption | another video's | AUC (chance 0.5) | own caption wins |\n"
        "|---|---|---|---|---|\n"
        f"| {scores['clips']:.0f} clips | {scores['own']:.3f} | {scores['other']:.3f} | "
        f"{scores['auc']:.3f} | {_percent(scores['wins'])} |"
    )


def summary(
    tallies: Mapping[str, Tally],
    speech: SpeechResult,
    languages: Mapping[str, Counter[tuple[str, str]]],
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """Returns the figures as plain values, for one line of JSON."""
    heard = speech.voices.values()
    words = sum(voice.words for voice in heard)
    pairs = [pair for counter in languages.values() for pair in counter.elements()]
    return {
        "captions": {
            kind: {
                "there": tally.wanted,
                "recall": _rounded(tally.recall),
                "named": tally.named,
                "precision": _rounded(tally.precision),
            }
            for kind, tally in tallies.items()
        },
        "wer": _rounded(sum(voice.errors for voice in heard) / words if words else None),
        "wer_by_voice": {name: _rounded(v.wer) for name, v in sorted(speech.voices.items())},
        "not_transcribed": sum(voice.clips - voice.transcribed for voice in heard),
        "transcribed_without_speech": speech.made_up,
        "language_accuracy": _rounded(
            sum(true == said for true, said in pairs) / len(pairs) if pairs else None
        ),
        "clip_score": {name: round(value, 4) for name, value in scores.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def write_between_marks(page: Path, text: str) -> None:
    """Replaces what stands between `BEGIN` and `END` on a page.

    Raises:
        ConfigError: If the page has not exactly one of each, in this order.
    """
    old = page.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ConfigError(f"{page} needs {BEGIN} and {END}, once each and in this order")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def bring_in(videos: Path, corpus: str, pipeline: str) -> None:
    """Brings demo videos into a corpus; what is there already is not done again."""
    from rich.console import Console

    from dataengine.config import load_pipeline
    from dataengine.ingest import ingest

    ingest(load_pipeline(pipeline), [str(videos / "videos")], corpus, Console(stderr=True))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=Path, help="a demo's folder; made if it is not there")
    parser.add_argument("--corpus", help="default: corpus/ in that folder; made if not there")
    parser.add_argument("--num-videos", type=int, default=40, help="of a demo that is made")
    parser.add_argument("--seed", type=int, default=0, help="of a demo that is made")
    parser.add_argument("--pipeline", default=str(ROOT / "pipelines/quickstart.yaml"))
    parser.add_argument("--model", help="CLIP model; default: the one that ships with the package")
    parser.add_argument("--rounds", type=int, default=10, help="other captions per clip")
    parser.add_argument("--write", type=Path, help="page with the two marks")
    arguments = parser.parse_args()

    videos = arguments.videos or Path("out/known_truth")
    if not (videos / "truth.json").exists() and (arguments.videos is None or not videos.exists()):
        render_demo(videos, num_videos=arguments.num_videos, seed=arguments.seed)
    where = arguments.corpus or str(videos / "corpus")
    if arguments.corpus is None:
        bring_in(videos, where, arguments.pipeline)

    corpus = Corpus.open(where)
    truths = load_truths(corpus, videos / "truth.json")
    rows = [row for row in corpus.catalog().to_pylist() if row["video_id"] in truths]
    tallies = compare_captions(rows, truths)
    speech, languages = compare_speech(rows, truths), compare_languages(rows, truths)
    config = OpenClipConfig(model=arguments.model) if arguments.model else OpenClipConfig()
    scores = score_pairs(corpus, build_clip_scorer(config), rows, "caption_video", arguments.rounds)

    tables = (caption_table(tallies), text_table(speech, languages), score_table(scores))
    text = f"{len(rows)} clips of {len(truths)} demo videos.\n\n" + "\n\n".join(tables)
    print(text)
    print(json.dumps(summary(tallies, speech, languages, scores)))
    if arguments.write:
        write_between_marks(arguments.write, text)


if __name__ == "__main__":
    main()
