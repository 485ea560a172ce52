# SPDX-License-Identifier: Apache-2.0
"""Tiny scorers in their models' own formats: random ones, and ones fitted to the known pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.models.known_pairs import KNOWN_PAIRS

CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip

VICLIP_CONFIG = {
    "kind": "viclip",
    "embed_dim": 16,
    "video": {
        "image_size": 32, "patch_size": 16, "num_frames": 4, "width": 64, "layers": 1, "heads": 1,
    },
    "text": {"context_length": 32, "width": 64, "layers": 1, "heads": 1},
}  # fmt: skip


def fit(model, embed_images, embed_texts, lr=2e-3):
    """Trains a model until every known picture is far closer to its own text than to the others."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    right = torch.arange(len(KNOWN_PAIRS))
    for _ in range(300):
        cosines = embed_images() @ embed_texts().T
        others = cosines.detach().masked_fill(torch.eye(len(right), dtype=torch.bool), -1.0)
        if (cosines.detach().diagonal() - others.max(dim=1).values).min() > 0.3:
            return
        loss = F.cross_entropy(5 * cosines, right) + F.cross_entropy(5 * cosines.T, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("the known pairs were not learnt")


def write_clip(folder: Path, *, fitted: bool = True, seed: int = 0) -> Path:
    """Writes a two-layer model as open_clip's own folder, half precision on disk."""
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = open_clip.CLIP(**CLIP_CONFIG["model_cfg"])
    if fitted:
        preprocess: Any = open_clip.image_transform(
            32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        images = torch.stack([preprocess(Image.fromarray(pair.draw())) for pair in KNOWN_PAIRS])
        tokens = open_clip.tokenize([pair.text for pair in KNOWN_PAIRS])
        fit(
            model,
            lambda: model.encode_image(images, normalize=True),
            lambda: model.encode_text(tokens, normalize=True),
        )
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def make_viclip(*, fitted: bool = True, seed: int = 0):
    """Returns a one-layer ViCLIP of 4 frames."""
    import torch
    from PIL import Image

    from dataengine.networks.config import IMAGENET_MEAN, IMAGENET_STD, ViCLIPConfig
    from dataengine.networks.text import clean_caption, tokenise
    from dataengine.networks.viclip import ViCLIP

    torch.manual_seed(seed)
    model = ViCLIP(ViCLIPConfig.model_validate(VICLIP_CONFIG))
    if fitted:
        size = (32, 32)
        pictures = [
            np.asarray(Image.fromarray(pair.draw()).resize(size, Image.Resampling.BICUBIC))
            for pair in KNOWN_PAIRS
        ]
        pixels = (np.stack(pictures) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        frames = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
        clips = frames[:, None].expand(-1, 4, -1, -1, -1)
        tokens = tokenise([clean_caption(pair.text) for pair in KNOWN_PAIRS], 32)
        fit(model, lambda: model.encode_video(clips), lambda: model.encode_text(tokens))
    return model.eval()
