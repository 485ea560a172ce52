# SPDX-License-Identifier: Apache-2.0
"""Folders of public benchmarks, as their makers publish them -> videos with texts, classes, questions.

A benchmark's folder holds its annotation files and its videos, anywhere below it: both are found by
name. Nothing is downloaded. Of an annotation only what evaluation needs is read.
"""

import csv
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from dataengine.errors import ConfigError
from training.evaluation.clips import Clip

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".m4v", ".mpg", ".3gp"}
)
DIDEMO_SECONDS = 30.0
"""DiDeMo's annotators saw the first thirty seconds of a video."""

Split = Literal["train", "test"]


class Captioned(NamedTuple):
    """A clip and the texts that describe it."""

    clip: Clip
    texts: tuple[str, ...]


class Labelled(NamedTuple):
    """A clip and its class."""

    clip: Clip
    label: int


class Labels(NamedTuple):
    """Clips and the names of all classes, by number."""

    classes: tuple[str, ...]
    clips: list[Labelled]


class Question(NamedTuple):
    """A clip, texts to choose from, and which of them are right."""

    clip: Clip
    options: tuple[str, ...]
    answers: frozenset[int]


class Folder:
    """A benchmark's folder: its files by name.

    Args:
        path: The folder.

    Raises:
        ConfigError: If there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"No folder {path}", "--folder names a benchmark's own folder")
        self.path = path
        self._by_name: dict[str, list[Path]] = {}
        self._videos: dict[str, list[Path]] = {}
        for file in sorted(_files_below(path)):
            if file.suffix.lower() in VIDEO_SUFFIXES:
                self._videos.setdefault(file.stem, []).append(file)
            else:
                self._by_name.setdefault(file.name, []).append(file)

    def file(self, *names: str) -> Path:
        """Returns the first of these files that is there.

        Raises:
            ConfigError: If none is, or one is there twice.
        """
        for name in names:
            found = self._by_name.get(name, [])
            if len(found) > 1:
                raise ConfigError(f"{name} is there twice: {found[0]} and {found[1]}")
            if found:
                return found[0]
        raise ConfigError(
            f"No {' or '.join(names)} in {self.path}",
            "the benchmark's own annotation files belong into this folder, under their own names",
        )

    def ending(self, suffix: str) -> list[str]:
        """Returns the names of files, not videos, that end so, in alphabetical order."""
        return sorted(name for name in self._by_name if name.endswith(suffix))

    def has(self, name: str) -> bool:
        """Returns whether there is a file of this name."""
        return name in self._by_name

    def clip(self, name: str, start_s: float = 0.0, end_s: float | None = None) -> Clip:
        """Returns a clip of the video of this name, whatever its suffix and folder.

        Args:
            name: A file's name, with or without suffix, with as much of its path as is known.
            start_s: Where the clip starts, seconds.
            end_s: Where it ends, seconds; None is the video's end.

        Raises:
            ConfigError: If several videos are meant.
        """
        wanted = PurePosixPath(name)
        # A name may have a dot in it that starts no suffix: LSMDC's times do.
        stem = wanted.stem if wanted.suffix.lower() in VIDEO_SUFFIXES else wanted.name
        found = self._videos.get(stem, [])
        parents = [part for part in wanted.parent.parts if part not in {"/", ".", ".."}]
        if len(found) > 1:
            ends = tuple(parents)
            found = [f for f in found if not ends or f.parent.parts[-len(ends) :] == ends]
        if len(found) > 1:
            raise ConfigError(f"{name} may be {found[0]} or {found[1]}", "leave one of them")
        return Clip(name, found[0] if found else None, start_s, end_s)


def msrvtt(folder: Folder, split: Split) -> list[Captioned]:
    """MSR-VTT, 1k-A split: one caption for each of 1000 test videos, twenty for each of 9000.

    Test: ``MSRVTT_JSFUSION_test.csv`` (key, vid_key, video_id, sentence). Train:
    ``MSRVTT_train.9k.csv`` (video_id) and ``MSRVTT_data.json`` (``sentences``).
    """
    if split == "test":
        rows = _csv(folder.file("MSRVTT_JSFUSION_test.csv"), "video_id", "sentence")
        return _by_video(folder, ((row["video_id"], row["sentence"]) for row in rows))
    rows = _csv(folder.file("MSRVTT_train.9k.csv"), "video_id")
    wanted = {row["video_id"] for row in rows}
    path = folder.file("MSRVTT_data.json")
    sentences = _json(path, dict).get("sentences") or []
    captions = ((_key(s, "video_id", path), _key(s, "caption", path)) for s in sentences)
    return _by_video(folder, ((video, text) for video, text in captions if video in wanted))


def msvd(folder: Folder, split: Split) -> list[Captioned]:
    """MSVD: about forty captions a video, 670 test videos.

    ``test_list.txt`` or ``train_list.txt`` (a video a line) and ``raw-captions.pkl`` or
    ``raw-captions.json`` (video -> captions, each a list of words or a sentence).
    """
    names = _lines(folder.file(f"{split}_list.txt"))
    path = folder.file("raw-captions.json", "raw-captions.pkl")
    captions = _plain_pickle(path) if path.suffix == ".pkl" else _json(path, dict)
    missing = [name for name in names if name not in captions]
    if missing:
        raise ConfigError(f"{path} has no captions of {missing[0]} and {len(missing) - 1} more")
    return [
        Captioned(
            folder.clip(name),
            tuple(t if isinstance(t, str) else " ".join(t) for t in captions[name]),
        )
        for name in names
    ]


def didemo(folder: Folder, split: Split) -> list[Captioned]:
    """DiDeMo: moments of the first thirty seconds of a video.

    ``test_data.json`` or ``train_data.json`` ([{video, description, times: [[first, last], ...]}], in
    pieces of five seconds, one pair an annotator). Video names keep their suffix or not.
    """
    moments = []
    path = folder.file(f"{split}_data.json")
    for item in _json(path, list):
        times = _key(item, "times", path)
        start_s = 5.0 * sum(first for first, _ in times) / len(times)
        end_s = 5.0 * (sum(last for _, last in times) / len(times) + 1)
        clip = folder.clip(_key(item, "video", path), start_s, min(end_s, DIDEMO_SECONDS))
        moments.append(Captioned(clip, (_key(item, "description", path).strip(),)))
    return moments


def activitynet(folder: Folder, split: Split) -> list[Captioned]:
    """ActivityNet Captions: sentences with a start and an end each.

    ``val_1.json`` or ``train.json`` ({v_ID: {timestamps: [[start, end], ...], sentences: [...]}}).
    """
    path = folder.file("val_1.json" if split == "test" else "train.json")
    return [
        Captioned(folder.clip(video, float(start_s), float(end_s)), (sentence.strip(),))
        for video, item in _json(path, dict).items()
        for (start_s, end_s), sentence in zip(
            _key(item, "timestamps", path), _key(item, "sentences", path), strict=True
        )
    ]


def lsmdc(folder: Folder, split: Split) -> list[Captioned]:
    """LSMDC: a sentence for each of 1000 short films of the challenge.

    ``LSMDC16_challenge_1000_publictect.csv`` or ``LSMDC16_annos_training.csv``: six columns between
    tabs without a header, the first the clip and the last the sentence.
    """
    name = (
        "LSMDC16_challenge_1000_publictect.csv" if split == "test" else "LSMDC16_annos_training.csv"
    )
    path = folder.file(name)
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        columns = line.split("\t")
        if len(columns) != 6:
            raise ConfigError(f"{path}:{number}: {len(columns)} columns between tabs, not six")
        pairs.append((columns[0], columns[5]))
    return _by_video(folder, pairs)


def vatex(folder: Folder, split: Split) -> list[Captioned]:
    """VATEX: ten English captions a clip; clips are named ID_START_END.

    ``vatex_validation_v1.0.json`` or ``vatex_training_v1.0.json`` ([{videoID, enCap: [...]}]), and for
    the 1500 clips of the retrieval split ``test_list.txt`` if it is there.
    """
    name = "vatex_validation_v1.0.json" if split == "test" else "vatex_training_v1.0.json"
    path = folder.file(name)
    listed = split == "test" and folder.has("test_list.txt")
    wanted = set(_lines(folder.file("test_list.txt"))) if listed else None
    return [
        Captioned(folder.clip(item["videoID"]), tuple(_key(item, "enCap", path)))
        for item in _json(path, list)
        if wanted is None or _key(item, "videoID", path) in wanted
    ]


def caption_list(folder: Folder, split: Split) -> list[Captioned]:
    """A list in the form of the released InternVideo code.

    ``test.json`` or ``train.json`` ([{video or image: PATH, caption: TEXT or [TEXT, ...]}]).
    """
    path = folder.file(f"{split}.json")
    found = []
    for item in _json(path, list):
        texts = _key(item, "caption", path)
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        found.append(Captioned(folder.clip(_video_of(item, path)), texts))
    return found


def kinetics(folder: Folder, split: Split) -> Labels:
    """Kinetics-400, -600 or -700: classes are the labels of the file, in alphabetical order.

    ``validate.csv``, ``val.csv`` or ``test.csv``, or ``train.csv`` (label, youtube_id, time_start,
    time_end); videos are named ID_START_END with six digits each, or ID alone.
    """
    names = ("validate.csv", "val.csv", "test.csv") if split == "test" else ("train.csv",)
    rows = list(_csv(folder.file(*names), "label", "youtube_id", "time_start", "time_end"))
    # A split that lacks a class must not number the others anew.
    labels = {row["label"] for row in rows}
    if folder.has("train.csv"):
        labels |= {row["label"] for row in _csv(folder.file("train.csv"), "label")}
    classes = tuple(sorted(labels))
    number_of = {name: number for number, name in enumerate(classes)}
    clips = []
    for row in rows:
        start_s, end_s = (int(float(row[name])) for name in ("time_start", "time_end"))
        clip = folder.clip(f"{row['youtube_id']}_{start_s:06d}_{end_s:06d}")
        if clip.path is None:
            clip = Clip(clip.name, folder.clip(row["youtube_id"]).path)
        clips.append(Labelled(clip, number_of[row["label"]]))
    return Labels(classes, clips)


def ssv2(folder: Folder, split: Split) -> Labels:
    """Something-Something v2: 174 classes, templates without the brackets.

    ``labels.json`` ({TEMPLATE: NUMBER}) and ``validation.json`` or ``train.json`` ([{id, template}]), or
    the same names behind ``something-something-v2-``.
    """
    part = "validation" if split == "test" else "train"
    labels_path = folder.file("labels.json", "something-something-v2-labels.json")
    number_of = {name: int(number) for name, number in _json(labels_path, dict).items()}
    path = folder.file(f"{part}.json", f"something-something-v2-{part}.json")
    clips = []
    for item in _json(path, list):
        template = _key(item, "template", path).replace("[", "").replace("]", "")
        if template not in number_of:
            raise ConfigError(f"{path}: {template!r} is no class of {labels_path}")
        clips.append(Labelled(folder.clip(str(_key(item, "id", path))), number_of[template]))
    return Labels(_classes(number_of, labels_path), clips)


def ucf101(folder: Folder, split: Split) -> Labels:
    """UCF101, first split: class names written apart (``ApplyEyeMakeup`` is apply eye makeup).

    ``classInd.txt`` (NUMBER NAME, from 1) and ``testlist01.txt`` or ``trainlist01.txt``
    (CLASS/VIDEO.avi).
    """
    labels_path = folder.file("classInd.txt")
    number_of = {
        name: int(number) - 1 for number, name in (line.split() for line in _lines(labels_path))
    }
    path = folder.file(f"{split}list01.txt")
    clips = []
    for line in _lines(path):
        name = line.split()[0]
        label = name.split("/")[0]
        if label not in number_of:
            raise ConfigError(f"{path}: {label} is no class of {labels_path}")
        clips.append(Labelled(folder.clip(name), number_of[label]))
    names = {re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name): i for name, i in number_of.items()}
    return Labels(_classes(names, labels_path), clips)


def hmdb51(folder: Folder, split: Split) -> Labels:
    """HMDB51, first split: classes in alphabetical order, underscores read as spaces.

    ``CLASS_test_split1.txt`` for each class (VIDEO.avi and 1 for training, 2 for testing, 0 for neither).
    """
    suffix = "_test_split1.txt"
    names = [file.removesuffix(suffix) for file in folder.ending(suffix)]
    if not names:
        raise ConfigError(
            f"No CLASS{suffix} in {folder.path}", "unpack test_train_splits.rar there"
        )
    mark = "2" if split == "test" else "1"
    clips = [
        Labelled(folder.clip(f"{name}/{line.split()[0]}"), number)
        for number, name in enumerate(names)
        for line in _lines(folder.file(name + suffix))
        if line.split()[1] == mark
    ]
    return Labels(tuple(name.replace("_", " ") for name in names), clips)


def label_list(folder: Folder, split: Split) -> Labels:
    """A list in the form of the released fine-tuning code.

    ``val.csv`` or ``test.csv``, or ``train.csv`` (PATH and a class' number, behind the last comma or
    space), and ``classes.txt`` (a name a line, by number).
    """
    path = folder.file(*(("val.csv", "test.csv") if split == "test" else ("train.csv",)))
    classes = tuple(_lines(folder.file("classes.txt")))
    clips = []
    for number, line in enumerate(_lines(path), 1):
        parts = re.split(r"[,\s](?=[^,\s]*$)", line)
        if len(parts) != 2 or not parts[1].isdigit() or int(parts[1]) >= len(classes):
            raise ConfigError(f"{path}:{number}: a path and a number below {len(classes)} expected")
        clips.append(Labelled(folder.clip(parts[0]), int(parts[1])))
    return Labels(classes, clips)


def msrvtt_mc(folder: Folder, split: Split) -> list[Question]:
    """MSR-VTT-MC: five captions to choose from, for each of 2990 videos.

    ``msrvtt_mc_test.json`` ([{video or image, caption: [five], answer: NUMBER}]), or
    ``msrvtt_mc_test.jsonl`` (clip_name, options, answer).
    """
    _only_test(split, "msrvtt_mc")
    path = folder.file("msrvtt_mc_test.json", "msrvtt_mc_test.jsonl")
    if path.suffix == ".json":
        return _questions(folder, path, _json(path, list))
    try:
        items = [json.loads(line) for line in _lines(path)]
    except ValueError as error:
        raise ConfigError(f"{path} is no list of JSON objects: {error}") from error
    return _questions(folder, path, items)


def ssv2_mc(folder: Folder, split: Split) -> list[Question]:
    """SSv2-MC: which of the 174 templates.

    ``ssv2_mc_val.json`` ([{video or image, option: [174], answer: NUMBER}]), or the files of `ssv2`.
    """
    _only_test(split, "ssv2_mc")
    if folder.has("ssv2_mc_val.json"):
        path = folder.file("ssv2_mc_val.json")
        return _questions(folder, path, _json(path, list))
    classes, clips = ssv2(folder, split)
    return [Question(clip, classes, frozenset({label})) for clip, label in clips]


def charades_mc(folder: Folder, split: Split) -> list[Question]:
    """Charades-MC: which of 157 actions, several at once or none.

    ``Charades_v1_classes.txt`` (c000 NAME) and ``Charades_v1_test.csv`` (id, actions: ``c092 11.90
    21.20;...``), or ``charades_mc_test.json`` ([{video or image, option: [157], answer: [0 or 1, ...]}]).
    """
    _only_test(split, "charades_mc")
    if folder.has("charades_mc_test.json"):
        path = folder.file("charades_mc_test.json")
        return _questions(folder, path, _json(path, list))
    lines = _lines(folder.file("Charades_v1_classes.txt"))
    options = tuple(line.split(" ", 1)[1] for line in sorted(lines))
    return [
        Question(
            folder.clip(row["id"]),
            options,
            frozenset(int(a.split()[0][1:]) for a in row["actions"].split(";") if a.strip()),
        )
        for row in _csv(folder.file("Charades_v1_test.csv"), "id", "actions")
    ]


@dataclass(frozen=True)
class RetrievalBenchmark:
    """Texts and videos that find each other."""

    read: Callable[[Folder, Split], list[Captioned]]
    context_length: int
    """Tokens of a text in published evaluations; models that read fewer are asked with fewer."""
    paragraph_span: tuple[float, float | None] | None = None
    """Span of the video that all its captions together describe, where they are joined into one text as
    published. None keeps captions apart."""


RETRIEVAL = {
    "msrvtt": RetrievalBenchmark(msrvtt, 32),
    "msvd": RetrievalBenchmark(msvd, 64),
    "didemo": RetrievalBenchmark(didemo, 64, (0.0, DIDEMO_SECONDS)),
    "activitynet": RetrievalBenchmark(activitynet, 150, (0.0, None)),
    "lsmdc": RetrievalBenchmark(lsmdc, 96),
    "vatex": RetrievalBenchmark(vatex, 32),
    "captions": RetrievalBenchmark(caption_list, 32),
}

CLASSIFICATION: dict[str, Callable[[Folder, Split], Labels]] = {
    "kinetics400": kinetics,
    "kinetics600": kinetics,
    "kinetics700": kinetics,
    "ssv2": ssv2,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "labels": label_list,
}

MULTIPLE_CHOICE: dict[str, Callable[[Folder, Split], list[Question]]] = {
    "msrvtt_mc": msrvtt_mc,
    "ssv2_mc": ssv2_mc,
    "charades_mc": charades_mc,
}


def paragraphs(captions: Iterable[Captioned], span: tuple[float, float | None]) -> list[Captioned]:
    """Returns one text a video: its captions in the order in which they begin, with spaces between.

    Args:
        captions: Of parts of videos.
        span: The part of each video that the text describes, seconds.
    """
    of_video: dict[str, list[Captioned]] = {}
    for caption in captions:
        of_video.setdefault(caption.clip.name, []).append(caption)
    joined = []
    for parts in of_video.values():
        parts.sort(key=lambda part: part.clip.start_s)
        clip = parts[0].clip._replace(start_s=span[0], end_s=span[1])
        joined.append(Captioned(clip, (" ".join(text for part in parts for text in part.texts),)))
    return joined


def _by_video(folder: Folder, pairs: Iterable[tuple[str, str]]) -> list[Captioned]:
    """Returns the captions of each video together, videos in the order of their first caption."""
    texts: dict[str, list[str]] = {}
    for video, text in pairs:
        texts.setdefault(video, []).append(text)
    return [Captioned(folder.clip(video), tuple(found)) for video, found in texts.items()]


def _questions(folder: Folder, path: Path, items: list[Any]) -> list[Question]:
    questions = []
    for item in items:
        video = item.get("clip_name") or _video_of(item, path)
        options = tuple(item.get("options") or item.get("option") or _key(item, "caption", path))
        answer = _key(item, "answer", path)
        if isinstance(answer, list):
            answers = frozenset(i for i, is_right in enumerate(answer) if is_right)
        else:
            answers = frozenset({int(answer)})
        if any(not 0 <= number < len(options) for number in answers):
            raise ConfigError(f"{path}: an answer to {video} is none of its {len(options)} options")
        questions.append(Question(folder.clip(video), options, answers))
    return questions


def _video_of(item: Any, path: Path) -> str:
    return _key(item, "video" if "video" in item else "image", path)


def _classes(number_of: dict[str, int], path: Path) -> tuple[str, ...]:
    """Returns the names by number, which must be 0, 1, 2..."""
    by_number = {number: name for name, number in number_of.items()}
    if sorted(by_number) != list(range(len(number_of))):
        raise ConfigError(f"{path}: classes are not numbered one after the other")
    return tuple(by_number[number] for number in range(len(by_number)))


def _files_below(top: Path) -> Iterator[Path]:
    """Yields all files of a folder and of folders that it links to, each folder's once."""
    seen: set[str] = set()
    # Links come last, so that a folder's own path is preferred and links that lead back up end.
    waiting = [str(top)]
    for start in waiting:
        for at, folders, files in os.walk(start):
            real = os.path.realpath(at)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            yield from (Path(at, name) for name in files)
            paths = (os.path.join(at, name) for name in sorted(folders))
            waiting.extend(path for path in paths if os.path.islink(path))


def _only_test(split: Split, name: str) -> None:
    if split != "test":
        raise ConfigError(f"{name} has no training split")


def _key(item: Any, name: str, path: Path) -> Any:
    try:
        return item[name]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: an entry has no {name}") from error


def _csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a table with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path} has no column {missing[0]}")
        yield from reader


def _json(path: Path, kind: type) -> Any:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, kind):
        raise ConfigError(f"{path} holds a {type(document).__name__}, not a {kind.__name__}")
    return document


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts and strings, and refuses whatever would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _plain_pickle(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open("rb") as file:
            document = _PlainUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is no pickle of plain lists: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no captions by video")
    return document
