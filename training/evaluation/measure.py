# SPDX-License-Identifier: Apache-2.0
"""A model on a public benchmark -> its numbers."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError, EngineError
from training.data.batch import Batch
from training.evaluation.benchmarks import (
    CLASSIFICATION,
    MULTIPLE_CHOICE,
    RETRIEVAL,
    Captioned,
    Folder,
    Labelled,
    Question,
    paragraphs,
)
from training.evaluation.classification import (
    Classification,
    class_features,
    classify,
    read_templates,
)
from training.evaluation.clips import Clip, ClipFrames, Views, read_clips
from training.evaluation.encode import (
    Encoded,
    Reading,
    encode_clips,
    encode_pairs,
    encode_texts,
    read_features,
    tokens_of,
)
from training.evaluation.loading import Loaded
from training.evaluation.matching import VideoBatches, match_pairs, rerank
from training.evaluation.multiple_choice import (
    Accuracy,
    MeanPrecision,
    accuracy,
    mean_average_precision,
)
from training.evaluation.probing import (
    ProbeConfig,
    TrainBatches,
    build_probe,
    cached_batches,
    frozen_features,
    measure_probe,
    train_probe,
)
from training.evaluation.retrieval import (
    BothScores,
    Retrieval,
    cosine_scores,
    distinct_texts,
    dual_softmax,
    rank_both,
)
from training.models.task import DualEncoder, Matcher

logger = logging.getLogger(__name__)

Measured = Retrieval | Classification | Accuracy | MeanPrecision


@dataclass(frozen=True)
class Evaluated:
    """Numbers, and what they are of."""

    measured: Measured
    num_clips: int
    """Clips that could be read."""
    num_listed: int
    """Clips that the annotation names."""
    num_texts: int
    failures: dict[str, str]
    """Name of those that could not -> reason."""


@dataclass(frozen=True)
class RetrievalOptions:
    """How candidates are scored."""

    dual_softmax: bool = False
    temperature: float = 1.0
    """Of the dual softmax."""
    rerank: int = 0
    """Candidates that the matcher judges again; 0 keeps cosines."""
    captions_apart: bool = False
    """Whether captions of a part of a video are asked one by one where they are published joined."""
    context_length: int | None = None
    """Tokens of a text; None takes the benchmark's."""


def retrieve(
    loaded: Loaded, reading: Reading, name: str, folder: Path, options: RetrievalOptions
) -> Evaluated:
    """Returns retrieval on a public benchmark.

    Raises:
        EngineError: If the model reads no text or cannot match, or the folder is not the benchmark's.
    """
    benchmark = RETRIEVAL[name]
    encoder = _encoder(loaded)
    captioned = benchmark.read(Folder(folder), "test")
    if benchmark.paragraph_span and not options.captions_apart:
        captioned = paragraphs(captioned, benchmark.paragraph_span)
    clips = [clip for clip, _ in captioned]
    encoded = _encode_readable(encoder.encode_video, clips, reading)
    kept = [captioned[position] for position in encoded.positions.tolist()]
    texts, pairs = _texts_of(kept)
    # A benchmark of short texts does not shorten what the model was made for.
    length = options.context_length or max(benchmark.context_length, loaded.spec.context_length)
    tokens_TL = tokens_of(texts, reading.spec, min(length, loaded.longest_text))
    text_TE = encode_texts(encoder.encode_text, tokens_TL, reading)
    device = reading.world.device
    scores = cosine_scores(_averaged(encoded).to(device), text_TE.to(device))
    read = [clips[position] for position in encoded.positions.tolist()]
    scores = _adjusted(
        scores, loaded, reading, lambda: _frames_of(read, reading), tokens_TL, options
    )
    return Evaluated(rank_both(scores, pairs), len(kept), len(clips), len(texts), encoded.failures)


def retrieve_from_corpus(
    loaded: Loaded,
    reading: Reading,
    batches: Callable[[], Iterable[Batch] | None],
    options: RetrievalOptions,
) -> Evaluated | None:
    """Returns retrieval on clips of a corpus, a caption each; None if none can be read.

    Captions that read the same are one caption.

    Args:
        loaded: The model.
        reading: Where and how; the corpus' reader decides about views.
        batches: Starts a pass over this process' clips.
        options: How candidates are scored.

    Raises:
        EngineError: If the model reads no text or cannot match.
    """
    _encoder(loaded)
    with reading.autocast():
        found = encode_pairs(loaded.task, batches(), reading.spec, reading.world)
    if found is None:
        return None
    first_of_text, pairs = distinct_texts(found.caption_id)
    device = reading.world.device
    scores = cosine_scores(found.video.to(device), found.text[first_of_text].to(device))

    def videos() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches() or ():
            if batch.frames is not None and batch.valid.any():
                numbers = torch.searchsorted(found.position, batch.position[batch.valid])
                yield numbers, reading.on_device(batch.frames[batch.valid])

    tokens_TL = found.tokens[first_of_text]
    scores = _adjusted(scores, loaded, reading, videos, tokens_TL, options)
    num_clips = len(found.position)
    return Evaluated(
        rank_both(scores, pairs),
        num_clips,
        num_clips + len(found.failures),
        len(first_of_text),
        found.failures,
    )


def _adjusted(
    scores: BothScores,
    loaded: Loaded,
    reading: Reading,
    videos: VideoBatches,
    tokens_TL: torch.Tensor,
    options: RetrievalOptions,
) -> BothScores:
    """Returns scores after dual softmax and re-ranking, as far as they are asked for."""
    if options.dual_softmax:
        scores = dual_softmax(scores, options.temperature)
    if options.rerank:
        matcher = _matcher(loaded, reading)
        with reading.autocast():
            scores = rerank(scores, matcher, videos, tokens_TL, options.rerank)
    return scores


def recognise(loaded: Loaded, reading: Reading, name: str, folder: Path) -> Evaluated:
    """Returns zero-shot classification on a public benchmark, with the published sentences.

    Raises:
        EngineError: If the model reads no text, or the folder is not the benchmark's.
    """
    encoder = _encoder(loaded)
    classes, labelled = CLASSIFICATION[name](Folder(folder), "test")
    templates = read_templates()
    encoded = _encode_readable(encoder.encode_video, [clip for clip, _ in labelled], reading)
    class_KE = class_features(_text_encoder(encoder, loaded, reading), classes, templates)
    label_N = torch.tensor([labelled[i].label for i in encoded.positions.tolist()])
    return Evaluated(
        classify(_averaged(encoded), class_KE, label_N),
        len(label_N),
        len(labelled),
        len(classes) * len(templates),
        encoded.failures,
    )


def answer(
    loaded: Loaded, reading: Reading, name: str, folder: Path, *, match: bool, temperature: float
) -> Evaluated:
    """Returns multiple choice on a public benchmark.

    Accuracy; mean average precision of the options' probabilities for Charades, whose videos have
    several right options.

    Args:
        loaded: The model.
        reading: How videos are read.
        name: One of `MULTIPLE_CHOICE`.
        folder: The benchmark's.
        match: Whether the matcher judges every option, rather than cosines.
        temperature: Of the softmax over the options, where their probabilities matter.

    Raises:
        EngineError: If the model reads no text or cannot match, or the folder is not the benchmark's.
    """
    encoder = _encoder(loaded)
    questions = MULTIPLE_CHOICE[name](Folder(folder), "test")
    clips = [question.clip for question in questions]
    encoded = _encode_readable(encoder.encode_video, clips, reading)
    kept = [questions[position] for position in encoded.positions.tolist()]
    texts = list(dict.fromkeys(option for question in kept for option in question.options))
    number_of = {text: number for number, text in enumerate(texts)}
    tokens_TL = tokens_of(texts, reading.spec, reading.spec.context_length)
    wanted = [np.array([number_of[option] for option in question.options]) for question in kept]
    if match:
        pairs = np.concatenate(
            [np.stack([texts, np.full(len(texts), n)], axis=1) for n, texts in enumerate(wanted)]
        )
        read = [question.clip for question in kept]
        with reading.autocast():
            judged_P = match_pairs(
                _matcher(loaded, reading), lambda: _frames_of(read, reading), tokens_TL, pairs
            )
        scores = np.split(judged_P, np.cumsum([len(texts) for texts in wanted])[:-1])
    else:
        text_TE = encode_texts(encoder.encode_text, tokens_TL, reading)
        video_NE = _averaged(encoded)
        scores = [
            (text_TE[texts] @ video_E / temperature).softmax(dim=0).numpy()
            for texts, video_E in zip(wanted, video_NE, strict=True)
        ]
    return Evaluated(
        _judge(scores, kept, several=name == "charades_mc"),
        len(kept),
        len(clips),
        len(texts),
        encoded.failures,
    )


def _judge(
    scores: Sequence[np.ndarray], questions: Sequence[Question], *, several: bool
) -> Accuracy | MeanPrecision:
    answers = [question.answers for question in questions]
    if not several:
        return accuracy(scores, answers)
    if len({question.options for question in questions}) > 1:
        raise ConfigError("Mean average precision needs the same options for every video")
    return mean_average_precision(np.stack(scores), answers)


def probe(
    loaded: Loaded,
    reading: Reading,
    name: str,
    folder: Path,
    config: ProbeConfig,
    *,
    augment: bool,
    cache_gb: float,
) -> Evaluated:
    """Trains a probe on a benchmark's training split and returns its accuracy on the other.

    Features that are not augmented are computed once, if they fit; otherwise anew in every epoch.

    Args:
        loaded: The model; stays as it is.
        reading: How test videos are looked at; training takes one view.
        name: One of `CLASSIFICATION`.
        folder: The benchmark's.
        config: The probe.
        augment: Whether training videos are cropped and mirrored at random, anew in each epoch.
        cache_gb: Main memory for features, GB.

    Raises:
        EngineError: If the model has no features to probe, the folder is not the benchmark's, or
            no video of a split can be read.
    """
    if reading.world.size > 1:
        raise ConfigError("A probe is trained by one process")
    features = frozen_features(loaded.task.network, config.kind)
    both = Folder(folder)
    classes, train = CLASSIFICATION[name](both, "train")
    test_classes, test = CLASSIFICATION[name](both, "test")
    if classes != test_classes:
        raise ConfigError(f"{name}: training and test split in {folder} have other classes")
    device = reading.world.device
    # Tried first, as training takes long.
    _first_features(features, [clip for clip, _ in test], reading, "test")
    torch.manual_seed(config.seed)
    failures: dict[str, str] = {}
    batches, num_train, width = _training_features(
        features, train, reading, config, failures, augment=augment, cache_gb=cache_gb
    )
    head = build_probe(config.kind, width, len(classes)).to(device)
    train_probe(head, batches, num_train, config, device)
    head.eval()
    parts = read_features(features, [clip for clip, _ in test], reading, failures)
    measured = measure_probe(
        head, ((part, _labels(test, positions)) for positions, part in parts), device
    )
    return Evaluated(measured, measured.num_clips, len(test), 0, failures)


def _training_features(
    features: Callable[[torch.Tensor], torch.Tensor],
    train: Sequence[Labelled],
    reading: Reading,
    config: ProbeConfig,
    failures: dict[str, str],
    *,
    augment: bool,
    cache_gb: float,
) -> tuple[TrainBatches, int, int]:
    """Returns batches of training features, how many clips they hold, and their width."""
    reading = replace(reading, views=Views())
    clips = [clip for clip, _ in train]
    shape = _first_features(features, clips, reading, "training").shape[2:]
    size_gb = 4e-9 * len(clips) * int(np.prod(shape))
    if not augment and size_gb <= cache_gb:
        parts = list(read_features(features, clips, reading, failures))
        all_features = torch.cat([part[:, 0] for _, part in parts])
        labels = _labels(train, torch.cat([positions for positions, _ in parts]))
        batches = cached_batches(all_features, labels, config.batch_size, config.seed)
        return batches, len(labels), shape[-1]
    if not augment:
        logger.info("features take %.1f GB: they are computed anew in every epoch", size_gb)

    def read_anew(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(clips), generator=generator).tolist()
        seed = (config.seed, epoch) if augment else None
        parts = read_features(features, clips, reading, failures, order=order, augment=seed)
        waiting = torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64)
        for positions, part in parts:
            new = part[:, 0], _labels(train, positions)
            waiting = torch.cat([waiting[0], new[0]]), torch.cat([waiting[1], new[1]])
            while len(waiting[1]) >= config.batch_size:
                yield waiting[0][: config.batch_size], waiting[1][: config.batch_size]
                waiting = waiting[0][config.batch_size :], waiting[1][config.batch_size :]
        if len(waiting[1]):
            yield waiting

    return read_anew, len(clips), shape[-1]


def _first_features(
    features: Callable[[torch.Tensor], torch.Tensor],
    clips: Sequence[Clip],
    reading: Reading,
    split: str,
) -> torch.Tensor:
    """Returns features of the first batch with a clip that can be read, [B, V, ...].

    Raises:
        EngineError: If there is none.
    """
    failures: dict[str, str] = {}
    for _, part in read_features(features, clips, reading, failures):
        return part
    raise _nothing_to_read(f"{split} videos", len(clips), failures)


def _labels(labelled: Sequence[Labelled], positions: torch.Tensor) -> torch.Tensor:
    return torch.tensor([labelled[position][1] for position in positions.tolist()])


def _encode_readable(
    encode: Callable[[torch.Tensor], torch.Tensor], clips: Sequence[Clip], reading: Reading
) -> Encoded:
    encoded = encode_clips(encode, clips, reading) if clips else None
    if encoded is None or not len(encoded.positions):
        raise _nothing_to_read("videos", len(clips), encoded.failures if encoded else {})
    return encoded


def _nothing_to_read(videos: str, number: int, failures: dict[str, str]) -> EngineError:
    if not number:
        return EngineError(f"The annotation names no {videos}")
    name, reason = next(iter(failures.items()))
    return EngineError(
        f"None of {number} {videos} can be read; {name}: {reason}",
        "the videos lie anywhere in --folder, under the names of the annotation",
    )


def _averaged(encoded: Encoded) -> torch.Tensor:
    """Returns one feature a clip, float32 [N, E] of unit length: the mean over its views."""
    if encoded.features.shape[1] == 1:
        return encoded.features[:, 0]
    return F.normalize(encoded.features.mean(dim=1), dim=-1)


def _texts_of(captioned: Sequence[Captioned]) -> tuple[list[str], np.ndarray]:
    """Returns all texts, and the pairs of text and clip, [P, 2]."""
    texts = [text for _, some in captioned for text in some]
    clips = [number for number, (_, some) in enumerate(captioned) for _ in some]
    return texts, np.stack([np.arange(len(texts)), np.array(clips)], axis=1)


def _text_encoder(
    encoder: DualEncoder, loaded: Loaded, reading: Reading
) -> Callable[[list[str]], torch.Tensor]:
    def encode(texts: list[str]) -> torch.Tensor:
        tokens_NL = tokens_of(texts, reading.spec, loaded.spec.context_length)
        return encode_texts(encoder.encode_text, tokens_NL, reading)

    return encode


def _frames_of(
    clips: Sequence[Clip], reading: Reading
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yields this process' clips once more, for the matcher."""
    spec, world = reading.spec, reading.world
    frames = ClipFrames(clips, spec.num_frames, spec.image_size, reading.views)
    for read in read_clips(
        frames,
        range(world.rank, len(clips), world.size),
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
    ):
        if len(read.positions):
            yield read.positions, reading.on_device(read.frames[:, 0])


def _encoder(loaded: Loaded) -> DualEncoder:
    encoder = loaded.task.dual_encoder()
    if encoder is None:
        raise ConfigError(
            f"The model in {loaded.path} reads no text",
            "--probe linear measures a video encoder alone, on a classification benchmark",
        )
    return encoder


def _matcher(loaded: Loaded, reading: Reading) -> Matcher:
    matcher = loaded.task.matcher()
    if matcher is None:
        raise ConfigError(f"The model in {loaded.path} does not judge pairs", "leave --rerank out")
    if reading.views.segments * reading.views.crops > 1:
        raise ConfigError("Pairs are judged by one view of a clip", "leave --views and --crops out")
    return matcher


def temperature_of(network: nn.Module) -> float:
    """Returns the learnt temperature by which a model divides cosines.

    Raises:
        ConfigError: If it has none.
    """
    for name, parameter in network.named_parameters():
        match name.split(".")[-1]:
            case "temp":
                return parameter.item()
            case "logit_scale":
                return (-parameter).exp().item()
    raise ConfigError("The model has no temperature", "give --temperature")
