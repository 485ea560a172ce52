# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's first stage: a student that sees few patches learns its teachers' features.

B clips, T frames, C H W a frame, P patches of a frame, V visible patches of a clip, N tokens, L tokens
of a text, D width, E embedding.

Source: InternVideo2 (arXiv:2403.15377), section 3.1, and its released training code.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.internvideo2 import (
    InternVideo2,
    draw_linears,
    positions_of,
    sinusoids,
    take,
)
from training.config import DistilConfig, DistilObjective
from training.data.batch import Inputs
from training.models.task import DualEncoder, StepOutput, Task
from training.models.teachers import (
    ClipTeacher,
    MaeTeacher,
    build_clip_teacher,
    build_mae_teacher,
)
from training.objectives.distil import distance


class Answers(NamedTuple):
    """What the student says of what its teachers saw; all of unit length, float32."""

    middle: tuple[torch.Tensor, ...]
    """Of the first teacher's layers, in the order of depth, [B, 1 + V, D] each."""
    final: torch.Tensor
    """Of its pooled feature, [B, E]."""
    mae: tuple[torch.Tensor, ...]
    """Of the second teacher's layers, in the order of depth, [B, V, D] each; empty without it."""


class Decoder(nn.Module):
    """Brings features to a teacher's width: one linear layer or two, a norm, unit length."""

    def __init__(self, width: int, out_width: int, kind: Literal["linear", "mlp"]) -> None:
        super().__init__()
        if kind == "linear":
            self.head = nn.Linear(width, out_width)
        else:
            # Exact GELU, as published; the blocks' is the tanh approximation.
            self.head = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_width)
            )
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors, float32."""
        return F.normalize(self.norm(self.head(x)).float(), dim=-1)


class Student(InternVideo2):
    """The vision encoder with the decoders of the first stage, under the published names.

    Args:
        config: The encoder's shape.
        decoder: Kind of the decoders for the first teacher; the second's are MLPs.
        clip_width: Width of the first teacher's layers.
        clip_embed_dim: Width of its pooled feature.
        num_clip_layers: Layers of it that are learnt, by as many of the student's last.
        mae_width: Width of the second teacher's layers; 0 is none.
        num_mae_layers: As ``num_clip_layers``.
    """

    def __init__(
        self,
        config: InternVideo2Config,
        *,
        decoder: Literal["linear", "mlp"],
        clip_width: int,
        clip_embed_dim: int,
        num_clip_layers: int,
        mae_width: int = 0,
        num_mae_layers: int = 0,
    ) -> None:
        super().__init__(config)
        self.num_clip_layers, self.num_mae_layers = num_clip_layers, num_mae_layers
        table_1ND = sinusoids(config.width, config.image_size // config.patch_size, config.num_frames)  # fmt: skip
        self.clip_pos_embed = nn.Parameter(table_1ND.clone())
        self.clip_decoder = nn.ModuleList(
            Decoder(config.width, clip_width, decoder) for _ in range(num_clip_layers)
        )
        self.final_clip_decoder = Decoder(config.embed_dim, clip_embed_dim, decoder)
        decoders: list[nn.Module] = [*self.clip_decoder, self.final_clip_decoder]
        if num_mae_layers:
            self.mae_pos_embed = nn.Parameter(table_1ND[:, 1:].clone())
            self.mae_decoder = nn.ModuleList(
                Decoder(config.width, mae_width, "mlp") for _ in range(num_mae_layers)
            )
            decoders += self.mae_decoder
        for part in decoders:
            draw_linears(part)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  answers instead of features
        self, frames_BTCHW: torch.Tensor, visible_BV: torch.Tensor
    ) -> Answers:
        """Returns what it makes of the patches it sees.

        Args:
            frames_BTCHW: As many frames as the config says, or one: an image.
            visible_BV: int64 numbers of the patches that are seen, counted frame after frame.
        """
        depth, T = self.config.layers, frames_BTCHW.shape[1]
        num_kept = max(self.num_clip_layers, self.num_mae_layers)
        encoded = self.encode(frames_BTCHW, visible_BV, range(depth - num_kept, depth))
        clip_1ND = self.clip_pos_embed
        clip_places_BVD = self._places(clip_1ND[:, 1:], T, visible_BV)
        cls_B1D = clip_1ND[:, :1].expand(len(visible_BV), -1, -1)
        clip_places_BND = torch.cat([cls_B1D, clip_places_BVD], dim=1)
        # Decoder 0 answers the shallowest layer that is learnt.
        middle = [
            decoder(layer_BND + clip_places_BND)
            for decoder, layer_BND in zip(
                self.clip_decoder, encoded.middle[num_kept - self.num_clip_layers :], strict=True
            )
        ]
        mae: list[torch.Tensor] = []
        if self.num_mae_layers:
            mae_places_BVD = self._places(self.mae_pos_embed, T, visible_BV)
            mae = [
                decoder(layer_BND[:, 1:] + mae_places_BVD)
                for decoder, layer_BND in zip(
                    self.mae_decoder, encoded.middle[num_kept - self.num_mae_layers :], strict=True
                )
            ]
        return Answers(tuple(middle), self.final_clip_decoder(encoded.pooled), tuple(mae))

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns the answer to the first teacher's pooled feature with all patches seen, [B, E]."""
        return self.final_clip_decoder(self.encode(frames_BTCHW).pooled)

    def _places(
        self, table_1LD: torch.Tensor, num_frames: int, visible_BV: torch.Tensor
    ) -> torch.Tensor:
        return positions_of(table_1LD, num_frames, self.config.num_frames)[0][visible_BV]


class DistilTask(Task):
    """A student and its frozen teachers.

    Args:
        config: The recipe's model.
        objective: Weights of the distances.

    Raises:
        ConfigError: If student and teachers do not fit together.
        DependencyError: If a teacher's weights are missing or do not fit.
    """

    def __init__(self, config: DistilConfig, objective: DistilObjective) -> None:
        super().__init__()
        if config.student.image_positions:
            raise ConfigError(
                "The first stage has no positions of images of their own: they come with the second",
                "set model.student.image_positions=false",
            )
        self._config, self._objective = config, objective
        self._clip_teacher: ClipTeacher = build_clip_teacher(config)
        self._mae_teacher: MaeTeacher | None = build_mae_teacher(config)
        self.network = build_student(config, self._clip_teacher, self._mae_teacher)

    def forward(self, inputs: Inputs) -> StepOutput:
        """Returns the weighted distances of this process' rows to its teachers."""
        frames_BTCHW = inputs.frames
        assert frames_BTCHW is not None
        student_frames = self._student_frames(frames_BTCHW)
        targets = _taught(self._clip_teacher, student_frames)
        visible_BV = visible_patches(targets.attention, self._config.mask_ratio, self._config.mask)
        seen_BN = F.pad(visible_BV + 1, (1, 0))  # and the class token
        middle = [take(layer_BND, seen_BN) for layer_BND in targets.middle]
        final_BE = targets.final
        del targets  # of a large teacher gigabytes, of which a fifth is seen
        mae: list[torch.Tensor] = []
        if self._mae_teacher is not None:
            mae = [take(x_BND, visible_BV) for x_BND in _taught(self._mae_teacher, frames_BTCHW)]
        answers = self._student(student_frames, visible_BV)
        valid_B, weights = inputs.pairs.valid, self._objective
        losses = {
            "clip_middle": weights.middle * distance(answers.middle, middle, valid_B),
            "clip_final": weights.final * distance([answers.final], [final_BE], valid_B),
        }
        if mae:
            losses["mae"] = weights.mae * distance(answers.mae, mae, valid_B)
        return StepOutput(losses, {})

    def dual_encoder(self) -> DualEncoder | None:
        """Returns itself if the first teacher reads text."""
        return self if self._clip_teacher.reads else None

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features in the first teacher's space, float32 [B, E]."""
        return self._student.encode_video(self._student_frames(frames_BTCHW))

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns the first teacher's unit-length features, float32 [B, E]."""
        return self._clip_teacher.encode_text(tokens_BL)

    def blocks(self) -> list[nn.Module]:
        """Returns the student's blocks."""
        return list(self._student.blocks)

    def no_decay(self) -> set[str]:
        """Returns positions and the class token."""
        return {"pos_embed", "cls_token"}

    def layer_of(self, name: str) -> tuple[int, int] | None:
        """Returns 0 for embeddings and i + 1 for block i; pooling and decoders are the head."""
        return _depth(name.removeprefix("network."), self._config.student.layers)

    @property
    def _student(self) -> Student:
        return cast(Student, self.network)

    def _student_frames(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns the first frame of each of the second teacher's tubelets, or all frames."""
        mae = self._config.mae_teacher
        return frames_BTCHW[:, :: mae.tubelet_size] if mae else frames_BTCHW


def build_student(
    config: DistilConfig, clip_teacher: ClipTeacher, mae_teacher: MaeTeacher | None
) -> Student:
    """Returns a freshly initialised student for its teachers.

    Raises:
        ConfigError: If it has fewer layers than are learnt.
    """
    num_clip_layers = len(clip_teacher.layers)
    num_mae_layers = len(mae_teacher.layers) if mae_teacher else 0
    if max(num_clip_layers, num_mae_layers) > config.student.layers:
        raise ConfigError(
            f"The student has {config.student.layers} layers, and "
            f"{max(num_clip_layers, num_mae_layers)} of a teacher are to be learnt",
            "lower model.num_clip_layers, model.num_mae_layers or the number of model.clip_layers",
        )
    return Student(
        config.student,
        decoder=config.decoder,
        clip_width=clip_teacher.width,
        clip_embed_dim=clip_teacher.embed_dim,
        num_clip_layers=num_clip_layers,
        mae_width=mae_teacher.width if mae_teacher else 0,
        num_mae_layers=num_mae_layers,
    )


def _call(teacher: Any, frames_BTCHW: torch.Tensor) -> Any:
    return teacher(frames_BTCHW)


# Teachers stay outside of a compiled graph: they move and cast themselves.
_taught = cast(Callable[[Any, torch.Tensor], Any], torch.compiler.disable(_call))


def visible_patches(
    attention_BTP: torch.Tensor,
    mask_ratio: float,
    mask: Literal["attention", "attention_joint", "random"],
) -> torch.Tensor:
    """Returns the numbers of the patches that the student sees, int64 [B, V], rising.

    Of n patches n - int(n * mask_ratio) are drawn without replacement by torch's default generator:
    n are those of each frame for ``attention``, and of the clip otherwise.

    Args:
        attention_BTP: Weight of each patch, not negative, of any sum; ``random`` ignores it.
        mask_ratio: Share of patches that are hidden.
        mask: What the draw goes by.
    """
    _, T, P = attention_BTP.shape
    # Weights of 0 must not stand in the way of a draw that needs more patches than the others.
    weights_BTP = attention_BTP.float().clamp(min=1e-12)
    match mask:
        case "attention":
            num_kept = P - int(P * mask_ratio)
            drawn_XV = torch.multinomial(weights_BTP.flatten(0, 1), num_kept)
            frame_T1 = torch.arange(T, device=drawn_XV.device)[:, None]
            visible_BV = (drawn_XV.unflatten(0, (-1, T)) + frame_T1 * P).flatten(1)
        case "attention_joint":
            num_kept = T * P - int(T * P * mask_ratio)
            visible_BV = torch.multinomial(weights_BTP.flatten(1), num_kept)
        case "random":
            num_kept = T * P - int(T * P * mask_ratio)
            visible_BV = torch.multinomial(torch.ones_like(weights_BTP).flatten(1), num_kept)
    return visible_BV.sort(dim=1).values


def _depth(name: str, layers: int) -> tuple[int, int] | None:
    """Returns (depth, number of depths) of a student's parameter, as published; None is the head."""
    first, *rest = name.split(".")
    if first in {"cls_token", "pos_embed", "img_pos_embed", "patch_embed"}:
        return 0, layers + 1
    if first == "blocks":
        return int(rest[0]) + 1, layers + 1
    return None
