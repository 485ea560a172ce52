# SPDX-License-Identifier: Apache-2.0
"""Recipe YAML + ``--set`` overrides -> one frozen ``TrainConfig``; all problems reported at once."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from dataengine.errors import ConfigError
from dataengine.networks.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    InternVideo2ClipConfig,
    InternVideo2Config,
    InternVideo2Stage2Config,
    LlamaTextConfig,
    NetworkConfig,
    TextTowerConfig,
    ViCLIPConfig,
    VideoTowerConfig,
)

RECIPES_DIR = Path(__file__).parent / "recipes"

MediaKind = Literal["video", "image", "audio", "audio_video"]
"""What the clips of a step are looked at as: an image is one frame of a clip, and ``audio`` is sound
alone."""


class OpenClipConfig(NetworkConfig):
    """An image-text model built by open_clip; a clip's feature is the mean over its frames'."""

    kind: Literal["open_clip"]
    embed_dim: int = Field(gt=0)
    video: VideoTowerConfig
    text: TextTowerConfig
    quick_gelu: bool = False
    """Whether GELU is OpenAI's sigmoid approximation; what weights are loaded from decides."""
    init_temperature: float = Field(default=0.07, ge=0.01, le=1.0)
    """CLIP starts at 0.07 and stops at 0.01."""
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _expressible(self) -> "OpenClipConfig":
        for tower, config in (("video", self.video), ("text", self.text)):
            if tower == "video" and (self.video.drop_path or self.video.checkpoint_activations):
                raise ValueError("open_clip's ViT has no drop_path and no checkpoint_activations")
            if config.width // config.heads * config.heads != config.width:
                raise ValueError(f"{tower}.width must be a multiple of {tower}.heads")
        return self


class OpenClipTeacherConfig(NetworkConfig):
    """An open_clip image model, run frame by frame; its text tower makes retrieval measurable."""

    kind: Literal["open_clip"]
    weights: str = ""
    """A folder that open_clip loads as ``local-dir:``; empty takes the tiny model that is shipped."""
    context_length: int = Field(default=48, gt=2)
    """Tokens that its text tower reads; 48 is the shipped model's, 77 CLIP's."""


class InternViTTeacherConfig(NetworkConfig):
    """InternVL-C's image encoder, run frame by frame; the defaults are InternViT-6B's shape."""

    kind: Literal["internvit"]
    weights: str | None = None
    """``internvl_c_13b_224px.pth``; None draws random weights from ``seed`` (for tests)."""
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=224, gt=0)
    patch_size: int = Field(default=14, gt=0)
    width: int = Field(default=3200, gt=0)
    layers: int = Field(default=48, gt=0)
    heads: int = Field(default=25, gt=0)
    mlp_width: int = Field(default=12800, gt=0)
    pool_heads: int = Field(default=16, gt=0)
    embed_dim: int = Field(default=768, gt=0)


class VideoMAETeacherConfig(NetworkConfig):
    """VideoMAEv2's encoder; the defaults are the -g model's shape."""

    kind: Literal["videomae"]
    weights: str | None = None
    """``mae_g14_hybrid.pth``; None draws random weights from ``seed``."""
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=224, gt=0)
    patch_size: int = Field(default=14, gt=0)
    num_frames: int = Field(default=16, gt=0)
    tubelet_size: int = Field(default=2, gt=0)
    width: int = Field(default=1408, gt=0)
    layers: int = Field(default=40, gt=0)
    heads: int = Field(default=16, gt=0)
    mlp_width: int = Field(default=6144, gt=0)


class InternVideo2TeacherConfig(NetworkConfig):
    """A stage-2 vision encoder, as the S, B and L models are distilled from."""

    kind: Literal["internvideo2"]
    weights: str | None = None
    """``InternVideo2-stage2_1b-224p-f4.pt``; None draws random weights from ``seed``."""
    weights_num_frames: int = Field(default=4, gt=0)
    """Frames of the position embeddings in the file."""
    seed: int = Field(default=0, ge=0)
    vision: InternVideo2Config


ClipTeacherConfig = Annotated[
    OpenClipTeacherConfig | InternViTTeacherConfig | InternVideo2TeacherConfig,
    Field(discriminator="kind"),
]


class DistilConfig(NetworkConfig):
    """InternVideo2's first stage: a student that sees few tokens learns two teachers' features.

    Section 3.1 of the InternVideo2 paper; with ``mae_teacher: null`` and an InternVideo2 teacher it is
    how the S, B and L models were made.
    """

    kind: Literal["internvideo2_distil"]
    student: InternVideo2Config
    clip_teacher: ClipTeacherConfig
    mae_teacher: VideoMAETeacherConfig | None = None
    clip_layers: tuple[int, ...] = ()
    """Layers of the first teacher that are learnt, counted from 0, rising; empty takes its last
    ``num_clip_layers``. The student's last layers, as many, answer them in the same order."""
    num_clip_layers: int = Field(default=6, gt=0)
    num_mae_layers: int = Field(default=4, gt=0)
    decoder: Literal["linear", "mlp"] = "linear"
    """What brings a student's layer to the width of the first teacher: ``linear`` in stage 1, ``mlp``
    for S, B and L. The second teacher's is always an MLP."""
    mask_ratio: float = Field(default=0.8, ge=0.0, lt=1.0)
    """Share of patches that the student does not see."""
    mask: Literal["attention", "attention_joint", "random"] = "attention"
    """``attention`` keeps patches of each frame by the teacher's pooling attention, ``attention_joint``
    draws over all frames at once (S, B, L), ``random`` keeps any."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD


class SourceConfig(NetworkConfig):
    """A corpus among those that are trained on."""

    data: str
    """``CORPUS`` or ``CORPUS#SUBSET``; CORPUS is a local folder or an fsspec URL."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch sees each of its clips: 2 twice, 0.25 a quarter of them, another one each
    epoch."""
    kinds: tuple[MediaKind, ...] = ()
    """Which of ``data.mix`` it feeds; empty means all."""


class MixConfig(NetworkConfig):
    """Steps of one kind of media."""

    caption: str | None = None
    """The text column for these steps; None takes ``data.caption``."""
    batch_size: int | None = Field(default=None, gt=0)
    """Clips per step over all processes; None takes ``data.batch_size``."""
    weight: float = Field(default=1.0, gt=0)
    """Share of an epoch's clips that these steps see: 0.5 half of them, another half each epoch."""


class DataConfig(NetworkConfig):
    """What is read from the corpora and in which order."""

    sources: tuple[SourceConfig, ...] = ()
    """``--data`` on the command line replaces them."""
    caption: str | None = "caption"
    """The text column to read; None trains without text."""
    media: Literal["frames", "video"] = "frames"
    """``frames`` reads the stored JPEGs (milliseconds), ``video`` decodes the MP4."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes the MP4."""
    mix: dict[MediaKind, MixConfig] = Field(default={"video": MixConfig()})
    """Kinds of media that take turns, one kind a step, the same in every process."""
    held_out: float = Field(ge=0.0, lt=1.0)
    """Share of the *videos* kept out of training and used for evaluation."""
    batch_size: int = Field(gt=0)
    """Clips per step over all processes: a run gives the same losses on one GPU and on many."""
    eval_batch_size: int = Field(default=64, gt=0)
    """Clips per process."""
    shuffle_buffer: int = Field(default=512, ge=1)
    """How far a clip may move from its row group's place in the epoch, in clips per lane."""
    num_workers: int = Field(default=0, ge=0)
    """Reader processes per training process; 0 reads in the training process itself. Changes
    nothing in the batches."""
    slots: int = Field(default=4, ge=1)
    """Parts of a batch that are read independently. Reading is cheapest when the number of processes
    divides it; changing it changes the batches."""
    lanes: int = Field(default=4, ge=1)
    """Independent read positions per slot, used by steps in turn. Reading is cheapest when
    ``num_workers`` divides it; changing it changes the batches."""
    cache_mb: int = Field(default=256, ge=1)
    """Row groups each reader keeps in memory, MiB. None is read twice if all readers of a process
    together keep slots / processes x lanes x shuffle_buffer clips."""
    read_ahead: int = Field(default=1, ge=0)
    """Row groups each reader fetches before they are asked for, on object stores."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area of the random crop as a share of the frame's, least and most (ViCLIP: 0.5 to 1)."""
    flip: bool = True
    """Whether half of the clips are mirrored. Off where captions name left and right."""
    crop_on: Literal["reader", "device"] = "reader"
    """Where crops are cut: in the readers, from the JPEG itself, or on the device, from the whole frame
    squeezed into a square by the readers."""
    clean_captions: bool = True
    """Whether captions lose case and punctuation as ViCLIP's do."""
    unique_videos: bool = False
    """Whether a global batch holds at most one clip of a video."""

    @model_validator(mode="after")
    def _ordered(self) -> "DataConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {low}, {high} must satisfy 0 < least <= most <= 1")
        if not self.mix:
            raise ValueError("mix names no kind of media")
        return self


class ContrastiveObjective(NetworkConfig):
    """InfoNCE, and what to do with rows that are not true negatives of each other."""

    kind: Literal["contrastive"] = "contrastive"
    same_caption: Literal["negative", "positive", "ignore"] = "positive"
    """Rows whose cleaned captions are equal: ``positive`` shares the target between them,
    ``ignore`` takes the pair out of the softmax."""
    same_video: Literal["negative", "positive", "ignore"] = "negative"
    """Rows cut from one video. The InternVid paper blames such false negatives for its 200M
    subset losing to its 10M one."""
    gradient: Literal["exact", "local"] = "exact"
    """``exact`` is the gradient of the global loss; ``local`` drops what other processes ask of a
    row, as the released training code does."""


class Stage2Objective(ContrastiveObjective):
    """InternVideo2's second stage (paper, section 3.2): contrast, matching and masked words.

    A weight of 0 leaves a loss out. v is video (or image), a audio, av both together, t text.
    """

    kind: Literal["stage2"] = "stage2"  # pyright: ignore[reportIncompatibleVariableOverride]  the tag
    vtc: float = Field(default=1.0, ge=0)
    vtm: float = Field(default=1.0, ge=0)
    mlm: float = Field(default=1.0, ge=0)
    atc: float = Field(default=0.0, ge=0)
    atm: float = Field(default=0.0, ge=0)
    amlm: float = Field(default=0.0, ge=0)
    avc: float = Field(default=0.0, ge=0)
    """Video against audio."""
    avtc: float = Field(default=1.0, ge=0)
    avtm: float = Field(default=1.0, ge=0)
    avmlm: float = Field(default=1.0, ge=0)
    hard_negatives: Literal["local", "global"] = "local"
    """Whether matching draws its negatives from this process' rows, as published, or from all."""
    mlm_probability: float = Field(default=0.5, gt=0, lt=1)
    video_mask_ratio: float = Field(default=0.8, ge=0, lt=1)
    """Share of a video's patches left out at random (paper: the masking of UMT kept in stage 2)."""
    image_mask_ratio: float = Field(default=0.5, ge=0, lt=1)


class DistilObjective(NetworkConfig):
    """Weights of the three distances to the teachers' features, each 2 - 2 cos (InternVideo2, 3.1)."""

    kind: Literal["distil"] = "distil"
    middle: float = Field(default=1.0, ge=0)
    """The first teacher's layers."""
    final: float = Field(default=1.0, ge=0)
    """Its pooled feature."""
    mae: float = Field(default=1.0, ge=0)
    """The second teacher's layers."""


ObjectiveConfig = Annotated[
    ContrastiveObjective | Stage2Objective | DistilObjective, Field(discriminator="kind")
]


class OptimConfig(NetworkConfig):
    """AdamW with linear warm-up and cosine decay. Exactly one of ``steps`` and ``epochs``."""

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from ``min_lr_ratio`` to 1."""
    min_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    """Learning rate at the end as a share of the highest."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0 never clips (ViCLIP does not)."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate per layer below the head (fine-tuning: 0.75 to 0.9)."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Of the running average of the weights that is evaluated and exported; 0 keeps none."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps in a row whose loss or gradient is not finite, and which are left out, before the run
    stops."""

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class RunConfig(NetworkConfig):
    """How the run behaves; nothing here changes what is learnt, but seed and precision."""

    seed: int = Field(ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """``fsdp`` shards weights, gradients and optimizer state over the processes (FSDP2)."""
    compile: bool = False
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log's numbers also go."""
    log_every: int = Field(default=20, gt=0)
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out clips; 0 evaluates before and after only."""
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)


ModelConfig = Annotated[
    ViCLIPConfig
    | OpenClipConfig
    | DistilConfig
    | InternVideo2Stage2Config
    | InternVideo2ClipConfig,
    Field(discriminator="kind"),
]

_OBJECTIVES = {"internvideo2_distil": "distil", "internvideo2_stage2": "stage2"}
"""Kind of model -> its kind of objective; all others are ``contrastive``."""


class InitConfig(NetworkConfig):
    """Where the first weights come from."""

    kind: Literal["clip", "weights", "checkpoint"]
    """``clip``: a CLIP through open_clip, inflated in time, its text context cut; ``weights``: a
    published file, through its key map, every weight accounted for; ``checkpoint``: a run of this
    trainer, or its export."""
    path: str
    """``clip``: a local folder or file, or ``ARCHITECTURE@FILE_OR_TAG`` of open_clip; else a path."""
    num_frames: int | None = Field(default=None, gt=0)
    """Frames of the position embeddings in the file, where its shape does not tell."""


class TrainConfig(NetworkConfig):
    """A whole recipe."""

    model: ModelConfig
    init: tuple[InitConfig, ...] = ()
    """Loaded in this order, each into the part of the model that its file holds."""
    data: DataConfig
    objective: ObjectiveConfig = ContrastiveObjective()
    optim: OptimConfig
    run: RunConfig

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_model(cls, document: Any) -> Any:
        """Fills in the objective's kind, which the model's decides."""
        if isinstance(document, dict) and isinstance(model := document.get("model"), dict):
            objective = document.get("objective") or {}
            if isinstance(objective, dict) and "kind" not in objective:
                kind = _OBJECTIVES.get(str(model.get("kind")), "contrastive")
                return {**document, "objective": {**objective, "kind": kind}}
        return document

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        wanted = _OBJECTIVES.get(self.model.kind, "contrastive")
        if self.objective.kind != wanted:
            raise ValueError(f"a {self.model.kind} model is trained with a {wanted} objective")
        model = self.model
        hears = isinstance(model, InternVideo2Stage2Config) and model.audio is not None
        if set(self.data.mix) - {"video", "image"} and not hears:
            raise ValueError(
                f"a {model.kind} model without model.audio hears nothing: mix video and image alone"
            )
        captions = [
            self.data.caption if mix.caption is None else mix.caption
            for mix in self.data.mix.values()
        ]
        if None in captions and not isinstance(model, DistilConfig):
            raise ValueError(
                f"a {model.kind} model learns from captions: data.caption names a column"
            )
        if (
            isinstance(model, InternVideo2ClipConfig)
            and isinstance(model.text, LlamaTextConfig)
            and model.vision.embed_dim != model.embed_dim
        ):
            raise ValueError(
                f"beside LLaMA the pooled feature is taken as it is: vision.embed_dim "
                f"{model.vision.embed_dim} must be embed_dim {model.embed_dim}"
            )
        return self


@dataclass(frozen=True)
class InputSpec:
    """What a model wants of a clip; the loader makes it."""

    num_frames: int
    image_size: int
    """Height and width, pixels."""
    tokenizer: Literal["clip", "bert", "llama", "none"]
    tokenizer_name: str
    """Hub id or local folder, for ``bert`` and ``llama``."""
    context_length: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    fbank: bool = False
    """Whether steps with sound are to be expected."""
    mask_id: int | None = None
    """Id of BERT's [MASK], which the tokenizer must agree with."""


def inputs_of(model: ModelConfig) -> InputSpec:
    """Returns what the loader must make for a model."""
    pixels = model.pixel_mean, model.pixel_std
    match model:
        case ViCLIPConfig() | OpenClipConfig():
            video, length = model.video, model.text.context_length
            return InputSpec(video.num_frames, video.image_size, "clip", "", length, *pixels)
        case DistilConfig():
            student, mae = model.student, model.mae_teacher
            # The second teacher sees every frame, the student one of each of its tubelets.
            num_frames = student.num_frames * (mae.tubelet_size if mae else 1)
            # A teacher's text tower does not train; it makes retrieval measurable.
            teacher = model.clip_teacher
            reads = isinstance(teacher, OpenClipTeacherConfig)
            tokenizer, length = ("clip", teacher.context_length) if reads else ("none", 0)
            return InputSpec(num_frames, student.image_size, tokenizer, "", length, *pixels)
        case InternVideo2Stage2Config():
            vision = model.vision
            beside = RECIPES_DIR / model.tokenizer
            name = str(beside) if (beside / "vocab.txt").is_file() else model.tokenizer
            return InputSpec(
                vision.num_frames, vision.image_size, "bert", name,
                model.context_length, *pixels, fbank=model.audio is not None,
                mask_id=model.text.mask_id,
            )  # fmt: skip
        case InternVideo2ClipConfig():
            vision, text = model.vision, model.text
            name = text.tokenizer if isinstance(text, LlamaTextConfig) else ""
            family = "llama" if isinstance(text, LlamaTextConfig) else "clip"
            return InputSpec(
                vision.num_frames, vision.image_size, family, name, text.context_length, *pixels
            )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Returns the recipe of that name or path with ``a.b=c`` overrides applied.

    Raises:
        ConfigError: With every problem found, not only the first.
    """
    path = _recipe_path(name)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of sections", "see training/recipes")
    problems = [problem for text in overrides if (problem := _override(document, text))]
    return _validated(document, str(path), problems)


def config_from_dict(document: dict[str, Any], where: str) -> TrainConfig:
    """Returns the config a checkpoint or another program wrote with ``model_dump``."""
    return _validated(document, where, [])


def _validated(document: dict[str, Any], where: str, problems: list[str]) -> TrainConfig:
    try:
        config = TrainConfig.model_validate(document)
    except ValidationError as error:
        problems = problems + [_describe(item) for item in error.errors()]
        config = None
    if config is None or problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{where} cannot be trained as written:\n{lines}",
            "fields and their meanings are in training/config.py",
        )
    return config


def _recipe_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"No recipe at {name}")
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES_DIR.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"Unknown recipe: {name}",
            f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}",
        )
    return path


def _override(document: dict[str, Any], text: str) -> str | None:
    """Writes one ``a.b=c`` into the document; returns the problem if it cannot."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return f"--set {text}: expected section.field=value"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"--set {text}: the value is not valid YAML"
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return f"--set {text}: {parent} is not a section"
        node = child
    # Steps and epochs exclude each other; who sets one means to replace the other.
    if parents == ["optim"] and last in {"steps", "epochs"}:
        node.pop("epochs" if last == "steps" else "steps", None)
    node[last] = parsed
    return None


def _describe(item: Any) -> str:
    """Returns one pydantic error as ``section.field: what is wrong (got value)``."""
    parts = [str(part) for part in item["loc"]]
    if len(parts) > 1 and parts[0] in {"model", "objective"}:
        del parts[1]  # the discriminator's tag is no key of the file
    place = ".".join(parts) or "the recipe"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], sorted(_field_names()), n=1)
        return f"{place}: unknown field" + (f", did you mean {close[0]}?" if close else "")
    if item["type"] == "missing":
        return f"{place}: missing"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):
        return f"{place}: {message}"
    return f"{place}: {message} (got {item['input']!r})"


def _field_names() -> set[str]:
    """Returns the names of all fields of a recipe, however deep."""
    names: set[str] = set()
    waiting: list[Any] = [TrainConfig]
    seen: set[Any] = set()
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        if isinstance(kind, type) and issubclass(kind, NetworkConfig):
            names |= set(kind.model_fields)
            waiting += [field.annotation for field in kind.model_fields.values()]
        else:
            waiting += get_args(kind)
    return names


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"duplicate keys {', '.join(sorted(twice))}{node.start_mark}")
        return super().construct_mapping(node, deep)
