# SPDX-License-Identifier: Apache-2.0
"""``python -m training.evaluate MODEL``: what a model is worth, on a corpus or a public benchmark.

What is measured follows from what is named: ``--data`` retrieval on a corpus, ``--benchmark`` what that
benchmark asks, ``--probe`` a classifier on frozen features.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.console import is_main_process, run_command, say

if TYPE_CHECKING:
    from training.distributed import World
    from training.evaluation.encode import Reading
    from training.evaluation.loading import Loaded
    from training.evaluation.measure import Evaluated, RetrievalOptions
    from training.evaluation.probing import ProbeConfig

_EXAMPLES = """\
examples:
  on the clips that a run held out:   python -m training.evaluate out/train/viclip_b --data CORPUS
  on a corpus it has not seen:        ... --data OTHER --all
  MSR-VTT as published:               ... --benchmark msrvtt --folder DIR
  with dual softmax; with matching:   ... --dual-softmax; ... --rerank 128
  zero-shot Kinetics, half CLIP:      ... --benchmark kinetics400 --folder DIR --wise-ft 0.5 --init CLIP
  a linear probe:                     ... --benchmark ssv2 --folder DIR --probe linear

benchmarks:
  retrieval        msrvtt msvd didemo activitynet lsmdc vatex captions
  classification   kinetics400 kinetics600 kinetics700 ssv2 ucf101 hmdb51 labels
  multiple choice  msrvtt_mc ssv2_mc charades_mc
captions and labels are lists in the form of the released InternVideo code: see
training/evaluation/benchmarks.py, which says what files each benchmark's folder holds.
"""


def main(arguments: list[str] | None = None) -> int:
    """Evaluates a model and prints its numbers; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)

    def run() -> None:
        _check(given, parser)
        from training.distributed import start

        with start() as world:
            loaded = _load(given)
            loaded.task.to(world.device)
            title, settings, evaluated = _measure(given, loaded, world)
            if is_main_process():
                from training.evaluation.report import print_evaluated, write_json

                say(f"{loaded.path} on {title}")
                print_evaluated(evaluated)
                if given.json:
                    write_json(given.json, evaluated, settings)

    return run_command(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Measures a trained model: retrieval, zero-shot classification, multiple "
        "choice, probes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="MODEL",
        help="a run's --output folder, a checkpoint of it, or a model folder",
    )  # fmt: skip
    what = parser.add_argument_group("on what").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="CORPUS[#SUBSET]", help="a corpus: retrieval of its captions"
    )
    what.add_argument("--benchmark", metavar="NAME", help="a public benchmark, read from --folder")
    corpus = parser.add_argument_group("with --data")
    corpus.add_argument(
        "--all", action="store_true",
        help="use every clip, for a corpus the model was not trained on",
    )  # fmt: skip
    corpus.add_argument("--caption", metavar="COLUMN", help="another text column than the recipe's")
    benchmark = parser.add_argument_group("with --benchmark")
    benchmark.add_argument(
        "--folder", type=Path, help="its videos and its own annotation files, anywhere below"
    )
    benchmark.add_argument(
        "--views", type=_positive, default=1, metavar="N",
        help="sets of frames of a clip, whose features are averaged (default: 1)",
    )  # fmt: skip
    benchmark.add_argument(
        "--crops", type=int, default=1, choices=(1, 3),
        help="1 squeezes the frame into the square, 3 takes three squares along its longer side",
    )  # fmt: skip
    benchmark.add_argument(
        "--captions-apart", action="store_true",
        help="ask for each caption's own part of the video, instead of joined captions and all of "
        "it (didemo, activitynet)",
    )  # fmt: skip
    benchmark.add_argument(
        "--context-length", type=_positive, metavar="L",
        help="tokens of a text, for models that can read more (default: the benchmark's)",
    )  # fmt: skip
    scoring = parser.add_argument_group("how")
    scoring.add_argument(
        "--dual-softmax", action="store_true",
        help="weigh each score by its softmax over all queries; needs all queries at once",
    )  # fmt: skip
    scoring.add_argument(
        "--temperature", type=_above_zero,
        help="of the dual softmax (default: 1, as published), or of the softmax over options "
        "(default: the model's own)",
    )  # fmt: skip
    scoring.add_argument(
        "--rerank", type=_positive, nargs="?", const=128, default=0, metavar="K",
        help="let the model judge the best K candidates in pairs (default of K: 128); of a multiple "
        "choice, all options",
    )  # fmt: skip
    scoring.add_argument(
        "--wise-ft", type=float, metavar="ALPHA",
        help="mix the weights: ALPHA of the model, the rest of --init (published: 0.5)",
    )  # fmt: skip
    scoring.add_argument(
        "--init", metavar="MODEL_OR_CLIP",
        help="what the model was trained from: a run, a model folder, a CLIP's folder or file, or "
        "ARCHITECTURE@FILE_OR_TAG",
    )  # fmt: skip
    probe = parser.add_argument_group("probes, on a benchmark of classes with its training split")
    probe.add_argument(
        "--probe", choices=("linear", "attentive"),
        help="train a classifier on frozen features: on the pooled one, or pooling all tokens anew",
    )  # fmt: skip
    probe.add_argument(
        "--epochs", type=_positive,
        help="default: 15, attentive 25; fewer keep a fifth as warm-up",
    )  # fmt: skip
    probe.add_argument(
        "--lr", type=_above_zero, help="per 256 clips; default: 1e-3, attentive 2e-4"
    )
    probe.add_argument(
        "--probe-batch", type=_positive, metavar="N", help="clips of a step (default: 256)"
    )
    probe.add_argument("--seed", type=int, default=0, help="of the probe (default: 0)")
    probe.add_argument(
        "--augment", action="store_true",
        help="crop and mirror training videos at random; encodes them anew in each epoch",
    )  # fmt: skip
    probe.add_argument(
        "--cache-gb", type=_above_zero, default=8.0, metavar="GB",
        help="memory for features that are computed once (default: 8)",
    )  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=_positive, default=16, help="clips (default: 16)")
    running.add_argument(
        "--workers", type=int, default=0, help="processes that decode (default: 0)"
    )
    running.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    running.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and settings")
    return parser


def _check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses options that do not go together, before anything is loaded.

    Raises:
        ConfigError: Naming them.
    """
    from dataengine.errors import ConfigError

    def only_with(other: str, is_given: bool, *names: str) -> None:
        for name in names:
            if not is_given and getattr(given, name) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')} goes with {other} only")

    has_benchmark, probes = given.benchmark is not None, given.probe is not None
    only_with("--data", not has_benchmark, "all", "caption")
    only_with(
        "--benchmark", has_benchmark,
        "folder", "views", "crops", "captions_apart", "context_length", "probe",
    )  # fmt: skip
    only_with("--probe", probes, "epochs", "lr", "probe_batch", "augment", "seed", "cache_gb")
    only_with("--wise-ft", given.wise_ft is not None, "init")
    only_with("retrieval and multiple choice", not probes, "dual_softmax", "rerank", "temperature")
    only_with("--dual-softmax", given.dual_softmax or has_benchmark, "temperature")
    if given.wise_ft is not None and given.init is None:
        raise ConfigError("--wise-ft needs --init", "the model that training started from")
    if has_benchmark and given.folder is None:
        raise ConfigError("--benchmark needs --folder", "the folder of its videos and annotation")


def _load(given: argparse.Namespace) -> "Loaded":
    """Returns the model, its weights mixed if that is asked for."""
    from training.evaluation.loading import initial_weights, load_model
    from training.evaluation.wise_ft import interpolate

    loaded = load_model(given.checkpoint)
    if given.wise_ft is not None:
        network = loaded.task.network
        initial = initial_weights(loaded, given.init)
        network.load_state_dict(interpolate(network.state_dict(), initial, given.wise_ft))
    return loaded


def _measure(
    given: argparse.Namespace, loaded: "Loaded", world: "World"
) -> "tuple[str, dict[str, Any], Evaluated]":
    """Returns what was measured in words, its settings, and its numbers.

    Raises:
        EngineError: If it cannot be measured.
    """
    from training.evaluation.clips import Views
    from training.evaluation.encode import Reading
    from training.evaluation.measure import RetrievalOptions

    reading = Reading(
        loaded.spec, world, Views(given.views, given.crops), given.batch_size, given.workers,
        given.precision == "bf16",
    )  # fmt: skip
    options = RetrievalOptions(
        dual_softmax=given.dual_softmax,
        temperature=given.temperature or 1.0,
        rerank=given.rerank,
        captions_apart=given.captions_apart,
        context_length=given.context_length,
    )
    settings = {
        **{name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items()},
        "checkpoint": str(loaded.path),
        "model": loaded.config.model_dump(mode="json"),
        "frames": loaded.spec.num_frames,
        "image_size": loaded.spec.image_size,
        "device": world.device.type,
        "processes": world.size,
    }
    if given.data is not None:
        title, evaluated = _on_corpus(given, loaded, reading, options)
    else:
        title, evaluated = given.benchmark, _on_benchmark(given, loaded, reading, options)
    changes = {
        "dual softmax": given.dual_softmax,
        f"{given.rerank} re-ranked": given.rerank,
        f"wise-ft {given.wise_ft} of {given.init}": given.wise_ft is not None,
        f"{given.probe} probe": given.probe,
    }
    return (
        ", ".join([title, *(name for name, is_on in changes.items() if is_on)]),
        settings,
        evaluated,
    )


def _on_corpus(
    given: argparse.Namespace, loaded: "Loaded", reading: "Reading", options: "RetrievalOptions"
) -> "tuple[str, Evaluated]":
    from dataengine.errors import ConfigError
    from training.config import MixConfig, SourceConfig
    from training.data.corpora import open_corpora
    from training.evaluation.loading import recipe_of
    from training.evaluation.measure import retrieve_from_corpus

    if loaded.recipe is None and not given.all:
        raise ConfigError(
            f"{loaded.path} does not say which clips were held out from training",
            "--all evaluates on every clip; a run's folder or checkpoint knows what it held out",
        )
    recipe = loaded.recipe or recipe_of(loaded)
    update: dict[str, Any] = {
        "sources": (SourceConfig(data=given.data),),
        "eval_batch_size": given.batch_size,
        "num_workers": given.workers or recipe.data.num_workers,
    }
    if given.caption:
        kind = "video" if "video" in recipe.data.mix else "image"
        update |= {"caption": given.caption, "mix": {kind: MixConfig()}}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})
    corpora = open_corpora(recipe, hold_out_all=given.all)
    index = corpora.held_out_index
    if not len(index):
        raise ConfigError(
            f"No held-out clip in {given.data} at data.held_out={recipe.data.held_out}",
            "--all evaluates on every clip",
        )
    world = reading.world
    evaluated = retrieve_from_corpus(
        loaded,
        reading,
        lambda: corpora.held_out_loader(rank=world.rank, world_size=world.size),
        options,
    )
    if evaluated is None:
        raise ConfigError(
            f"None of {len(index)} clips of {given.data} has both a text and pictures",
            "--caption names the text column",
        )
    return f"{len(index)} clips of {index.num_videos} videos", evaluated


def _on_benchmark(
    given: argparse.Namespace, loaded: "Loaded", reading: "Reading", options: "RetrievalOptions"
) -> "Evaluated":
    from dataengine.errors import ConfigError
    from training.evaluation import measure
    from training.evaluation.benchmarks import CLASSIFICATION, MULTIPLE_CHOICE, RETRIEVAL

    name, folder = given.benchmark, given.folder
    if given.probe and name not in CLASSIFICATION:
        raise ConfigError(
            f"{name} has no classes to probe for", f"those that have: {', '.join(CLASSIFICATION)}"
        )
    if given.probe:
        return measure.probe(
            loaded, reading, name, folder, _probe_config(given),
            augment=given.augment, cache_gb=given.cache_gb,
        )  # fmt: skip
    if name in RETRIEVAL:
        return measure.retrieve(loaded, reading, name, folder, options)
    if given.dual_softmax or given.captions_apart or given.context_length:
        raise ConfigError(f"{name} is no retrieval", "leave the options of retrieval out")
    if name in CLASSIFICATION:
        if given.rerank or given.temperature:
            raise ConfigError(
                f"{name} is neither retrieval nor multiple choice", "leave --rerank out"
            )
        return measure.recognise(loaded, reading, name, folder)
    if name in MULTIPLE_CHOICE:
        temperature = given.temperature or measure.temperature_of(loaded.task.network)
        return measure.answer(
            loaded, reading, name, folder, match=bool(given.rerank), temperature=temperature
        )
    known = ", ".join([*RETRIEVAL, *CLASSIFICATION, *MULTIPLE_CHOICE])
    raise ConfigError(f"Unknown benchmark {name}", f"known are {known}")


def _probe_config(given: argparse.Namespace) -> "ProbeConfig":
    from training.evaluation.probing import DEFAULTS

    named = {"epochs": given.epochs, "lr": given.lr, "batch_size": given.probe_batch}
    config = replace(DEFAULTS[given.probe], seed=given.seed)
    if given.epochs is not None and given.epochs < config.epochs:
        # The published share: otherwise a few epochs would be nothing but warm-up.
        share = given.epochs / config.epochs
        config = replace(config, warmup_epochs=config.warmup_epochs * share)
    return replace(config, **{name: value for name, value in named.items() if value is not None})


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
