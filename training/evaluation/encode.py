# SPDX-License-Identifier: Apache-2.0
"""A model and clips -> retrieval over them; every process encodes its share."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from training.config import ModelConfig
from training.data.loader import Batch
from training.data.transforms import normalise
from training.distributed import World, gather_objects
from training.evaluation.retrieval import Retrieval, retrieval
from training.models import DualEncoder


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], config: ModelConfig, world: World
) -> Retrieval | None:
    """Returns retrieval over all clips of all processes, or None if none of them could be read.

    Every process must call it, and every process gets the answer. The model is left in the mode
    it came in.
    """
    was_training = model.training
    model.eval()
    encoder = cast(DualEncoder, model)
    parts: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        valid = batch.valid
        if not valid.any():
            continue
        frames_BTHWC = batch.frames[valid].to(world.device)
        frames_BTCHW = normalise(frames_BTHWC, config.pixel_mean, config.pixel_std)
        video_BE = encoder.encode_video(frames_BTCHW).cpu()
        text_BE = encoder.encode_text(batch.tokens[valid].to(world.device)).cpu()
        parts.append((video_BE, text_BE, batch.caption_id[valid]))
    model.train(was_training)
    everyones = [part for rank_parts in gather_objects(parts) for part in rank_parts]
    if not everyones:
        return None
    video, text, caption_id = (torch.cat(column) for column in zip(*everyones, strict=True))
    return retrieval(video, text, caption_id)
