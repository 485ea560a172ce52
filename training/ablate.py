# SPDX-License-Identifier: Apache-2.0
"""``python -m training.ablate RECIPE --data A --data B``: what data is worth, at equal compute.

InternVid asks which of its clips to train on (section 4.2: DIV against FLT against a random draw) and
answers with retrieval after the same training on each. Here every set is trained with several seeds,
the same recipe, batch size and number of steps, and all models are asked the same held-out queries.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataengine.errors import ConfigError, EngineError
from training.config import SourceConfig, TrainConfig, load_recipe
from training.console import run_command, say

_RESAMPLES = 4_000
"""Bootstrap resamples: the ends of a 95 % interval move by about 2 % of its width."""


@dataclass(frozen=True)
class Hits:
    """What one trained model answered; one entry a query."""

    text_to_video: dict[int, NDArray[np.float64]]
    """k -> probability that a right clip is among the first k."""
    video_to_text: dict[int, NDArray[np.float64]]
    text_video: NDArray[np.int64]
    """Number of the video each text query belongs to: queries of a video are no independent draws."""
    video_video: NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, in [0, 1] (differences in [-1, 1])."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """Returns ``12.3 [10.1, 14.6]``."""
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def main(arguments: list[str] | None = None) -> int:
    """Trains every set with every seed and prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.ablate",
        description="Trains one recipe on several sets of clips and compares retrieval.",
        epilog="The same command goes on where it was stopped.",
    )
    parser.add_argument("recipe", help="a name in training/recipes, or the path of a YAML file")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="CORPUS[#SUBSET]",
        help="two or more; the first is what the others are compared with",
    )
    parser.add_argument(
        "--test",
        metavar="CORPUS[#SUBSET]",
        help="whose held-out videos are asked (default: the first --data's corpus, all of it)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each set (default: 3)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--output", type=Path, help="default: out/ablate/RECIPE")
    parser.add_argument(
        "--processes", type=int, default=1, help="of each training, through torchrun (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    given = parser.parse_args(arguments)

    def compare() -> None:
        if given.seeds < 1 or given.processes < 1:
            raise ConfigError("--seeds and --processes are at least 1")
        if len(set(given.data)) < 2:
            raise ConfigError("Nothing to compare", "give --data two or more times")
        config = load_recipe(given.recipe, given.overrides)
        if not config.data.held_out:
            raise ConfigError("Nothing is held out to ask", "--set data.held_out=0.1")
        test = given.test or given.data[0].partition("#")[0]
        output = given.output or Path("out", "ablate", Path(given.recipe).stem)
        names = _names(given.data)
        steps = _equal_steps(config, given.data)
        say(
            f"{len(names)} sets x {given.seeds} seeds, {steps} steps of {config.data.batch_size} clips"
        )
        hits: dict[str, list[Hits]] = {name: [] for name in names}
        for name, data in zip(names, given.data, strict=True):
            for seed in range(given.seeds):
                run = output / name / f"seed_{seed}"
                overrides = [*given.overrides, f"run.seed={seed}", f"optim.steps={steps}"]
                _train(given.recipe, data, overrides, run, given.processes)
                hits[name].append(_ask(run, test))
        table = compare_hits(hits, seed=config.run.seed)
        _print(table, hits, test)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            settings = {
                "recipe": given.recipe, "overrides": given.overrides, "test": test,
                "data": dict(zip(names, given.data, strict=True)), "steps": steps,
                "batch_size": config.data.batch_size, "seeds": given.seeds,
            }  # fmt: skip
            rows = {
                name: {column: vars(cell) for column, cell in row.items()}
                for name, row in table.items()
            }
            given.json.write_text(json.dumps({**settings, "results": rows}, indent=2) + "\n")

    return run_command(compare)


def compare_hits(hits: dict[str, list[Hits]], *, seed: int) -> dict[str, dict[str, Estimate]]:
    """Returns retrieval of each set, and each set's difference to the first.

    Intervals come from a bootstrap that draws videos, with all their queries, and seeds anew; the videos
    are the same for both sides of a difference (paired).

    Args:
        hits: Name of a set -> what its models answered, one entry a seed.
        seed: Of the resamples.

    Returns:
        Name of a set -> column (``t2v_r1`` ..., ``t2v_r1_difference`` ...) -> estimate. The first set has
        no differences.
    """
    table: dict[str, dict[str, Estimate]] = {name: {} for name in hits}
    first = next(iter(hits))
    cutoffs = sorted(hits[first][0].text_to_video)
    for direction in ("t2v", "v2t"):
        for k in cutoffs:
            column = f"{direction}_r{k}"
            resampled: dict[str, tuple[float, NDArray[np.float64]]] = {}
            for number, (name, models) in enumerate(hits.items()):
                answers_SQ = np.stack([_answers(model, direction)[k] for model in models])
                video_Q = models[0].text_video if direction == "t2v" else models[0].video_video
                draws_R = _resampled(answers_SQ, video_Q, seed, number)
                resampled[name] = float(answers_SQ.mean()), draws_R
            for name, (mean, draws_R) in resampled.items():
                table[name][column] = _estimate(mean, draws_R)
                if name != first:
                    base, base_R = resampled[first]
                    difference = _estimate(mean - base, draws_R - base_R)
                    table[name][f"{column}_difference"] = difference
    return table


def _answers(model: Hits, direction: str) -> dict[int, NDArray[np.float64]]:
    return model.text_to_video if direction == "t2v" else model.video_to_text


def _resampled(
    answers_SQ: NDArray[np.float64], video_Q: NDArray[np.int64], seed: int, number: int
) -> NDArray[np.float64]:
    """Returns the mean of each resample; all sets draw the same videos, each its own seeds."""
    _, of_query = np.unique(video_Q, return_inverse=True)
    num_videos = int(of_query.max()) + 1
    sums_SV = np.stack([np.bincount(of_query, row, num_videos) for row in answers_SQ])
    size_V = np.bincount(of_query, minlength=num_videos)
    videos = np.random.default_rng([seed, 0])
    seeds = np.random.default_rng([seed, 1, number])
    num_seeds = len(answers_SQ)
    parts: list[NDArray[np.float64]] = []
    chunk = max(1, min(_RESAMPLES, 20_000_000 // num_videos))
    for start in range(0, _RESAMPLES, chunk):
        count = min(chunk, _RESAMPLES - start)
        drawn_RV = videos.multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=count)
        drawn_RS = seeds.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count)
        hit_R = ((drawn_RV @ sums_SV.T) * drawn_RS).sum(axis=1) / num_seeds
        parts.append(hit_R / (drawn_RV @ size_V))
    return np.concatenate(parts)


def _estimate(mean: float, draws_R: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(draws_R, [2.5, 97.5])
    return Estimate(float(mean), float(low), float(high))


def _names(data: Sequence[str]) -> list[str]:
    """Returns a short name for each set: its subset, its folder, or both where that is not enough."""
    short = [text.partition("#")[2] or Path(text).name for text in data]
    if len(set(short)) == len(short):
        return short
    return [text.strip("/").replace("/", "_").replace("#", "-") for text in data]


def _equal_steps(config: TrainConfig, data: Sequence[str]) -> int:
    """Returns the steps of every run: the recipe's, or its epochs over the smallest set."""
    if config.optim.steps:
        return config.optim.steps
    from training.data.corpora import open_corpora

    steps: list[int] = []
    for text in data:
        sources = (SourceConfig(data=text),)
        own = config.model_copy(
            update={"data": config.data.model_copy(update={"sources": sources})}
        )
        loader = open_corpora(own).train_loader(seed=0)
        steps.append(math.ceil((config.optim.epochs or 0) * loader.steps_per_epoch))
    return min(steps)


def _train(recipe: str, data: str, overrides: Sequence[str], run: Path, processes: int) -> None:
    """Trains one model in a process of its own, or goes on with it."""
    many = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(many if processes > 1 else []), "training", recipe]
    command += ["--data", data, "--output", str(run)]
    for text in overrides:
        command += ["--set", text]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise EngineError(
            f"Training on {data} stopped with exit code {done.returncode}",
            "what went wrong is above; the same command goes on",
        )


def _ask(run: Path, test: str) -> Hits:
    """Returns what a run's model answers on the held-out videos of a corpus."""
    import torch

    from training.data.corpora import open_corpora
    from training.distributed import World
    from training.evaluation.encode import encode_pairs
    from training.evaluation.loading import load_model
    from training.evaluation.retrieval import distinct_texts, retrieval

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(run)
    assert loaded.recipe is not None
    sources = (SourceConfig(data=test),)
    data = loaded.recipe.data.model_copy(update={"sources": sources})
    corpora = open_corpora(loaded.recipe.model_copy(update={"data": data}))
    task = loaded.task.to(device)
    pairs = encode_pairs(task, corpora.held_out_loader(), loaded.spec, World(0, 1, device))
    if pairs is None:
        raise ConfigError(
            f"No held-out clip of {test} can be asked",
            "the recipe's data.held_out is the share of videos that are; its model must read text",
        )
    found = retrieval(pairs.video, pairs.text, pairs.caption_id)
    video_of_clip = corpora.held_out_index.video_hash[pairs.position.numpy()]
    text_of, _ = distinct_texts(pairs.caption_id)
    return Hits(
        found.text_to_video.hits,
        found.video_to_text.hits,
        video_of_clip[text_of.numpy()],
        video_of_clip,
    )


def _print(table: dict[str, dict[str, Estimate]], hits: dict[str, list[Hits]], test: str) -> None:
    """Prints the table and a sentence per comparison."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(hits))
    columns = [column for column in table[first]]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("set", *columns):
        shown.add_column(name.replace("_r", " R@"), justify="left" if name == "set" else "right")
    for name, row in table.items():
        shown.add_row(name, *(row[column].percent() for column in columns))
    num_queries = len(hits[first][0].text_video)
    Console(width=200 if not sys.stdout.isatty() else None).print(shown)
    say(f"%, mean of {len(hits[first])} seeds [95 %], {num_queries} captions of {test} as queries")
    for name, row in table.items():
        if name == first:
            continue
        difference = row["t2v_r1_difference"]
        verdict = "no difference is shown"
        if difference.low > 0 or difference.high < 0:
            verdict = "better" if difference.low > 0 else "worse"
        say(f"{name} against {first}: text->video R@1 {difference.percent()} points, {verdict}")


if __name__ == "__main__":
    sys.exit(main())
