# SPDX-License-Identifier: Apache-2.0
"""Where the log's numbers also go: TensorBoard, Weights & Biases. Both are optional packages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from dataengine.errors import DependencyError


class Tracker(Protocol):
    """Keeps numbers of a run elsewhere."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Takes the numbers of a step."""
        ...

    def close(self) -> None:
        """Writes what is held back."""
        ...


def open_trackers(
    names: Sequence[Literal["tensorboard", "wandb"]], output: Path, config: dict[str, Any]
) -> tuple[Tracker, ...]:
    """Returns the trackers of a recipe.

    Args:
        names: Of ``run.trackers``.
        output: The run's folder; TensorBoard's files go into ``tensorboard``, W&B's into ``wandb``.
        config: The resolved recipe, shown beside the numbers.

    Raises:
        DependencyError: If a package is missing.
    """
    opened: list[Tracker] = []
    for name in names:
        match name:
            case "tensorboard":
                opened.append(_TensorBoard(output))
            case "wandb":
                opened.append(_WandB(output, config))
    return tuple(opened)


class _TensorBoard:
    def __init__(self, output: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DependencyError(
                "run.trackers names tensorboard, which is not installed", "uv sync --extra track"
            ) from error
        self._writer = SummaryWriter(str(output / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, output: Path, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  an extra
        except ImportError as error:
            raise DependencyError(
                "run.trackers names wandb, which is not installed", "uv sync --extra track"
            ) from error
        # The run's name is its folder's, so that a run that goes on is the same run there.
        self._run = wandb.init(
            project="dataengine",
            id=output.resolve().name,
            resume="allow",
            dir=str(output),
            config=config,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
