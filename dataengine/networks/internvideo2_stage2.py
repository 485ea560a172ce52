# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's second stage: vision and text in one space, and a decoder that looks at both.

The vision encoder, BEATs and the first layers of a BERT are brought to unit vectors whose cosine says
how well two media fit; the last layers of the BERT read a text while looking at the tokens of video,
sound or both, and a linear layer on the first state says whether they belong together.

B clips or texts, T frames, F M a spectrogram, N tokens of video or sound, S their width in the
decoder, L tokens of a text, D its width, E shared space.

Source: InternVideo2 (Wang et al. 2024, arXiv:2403.15377), section 3.2, and the released code's shapes.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import DependencyError
from dataengine.networks import beats
from dataengine.networks.bert import Bert, plain_bert, published_bert
from dataengine.networks.config import InternVideo2Stage2Config
from dataengine.networks.internvideo2 import (
    InternVideo2,
    fit_published,
    published_state,
    stretch_positions,
)

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5
"""Between which the learnt tau is held, as in the released code."""

Head = Literal["itm_head", "atm_head", "avtm_head"]
"""What judges whether a text fits video, sound, or both together."""


class Media(NamedTuple):
    """What is made of video, of sound, or of both."""

    tokens: torch.Tensor
    """What the decoder looks at, [B, N, S]."""
    feature: torch.Tensor
    """In the shared space, not of unit length, [B, E]."""


class InternVideo2Stage2(nn.Module):
    """The encoders, the decoder, and the learnt temperature; knows no loss and no distribution.

    State-dict keys are those of the published checkpoints, but inside ``audio_encoder``, whose names
    are `Beats`'s; `published_stage2` gives all the names of a published file.

    Args:
        config: Its shape. An encoder that is frozen asks for no gradient, computes none, and stays in
            evaluation mode: without stochastic depth.
    """

    def __init__(self, config: InternVideo2Stage2Config) -> None:
        super().__init__()
        self.config = config
        vision, audio, text_width = config.vision, config.audio, config.text.width
        width = vision.width if audio is None else config.fusion_width
        self.temp = nn.Parameter(torch.tensor(config.init_temperature))
        self.vision_encoder = InternVideo2(vision)
        self.text_encoder = Bert(config.text, width)
        self.vision_proj = nn.Linear(vision.embed_dim, config.embed_dim)
        self.text_proj = nn.Linear(text_width, config.embed_dim)
        self.itm_head = nn.Linear(text_width, 2)
        if audio is not None:
            self.audio_encoder = beats.Beats(audio)
            self.audio_proj = nn.Linear(audio.width, config.embed_dim)
            self.av_concat_vision_proj = _to_decoder(vision.width, width)
            self.av_concat_audio_proj = _to_decoder(audio.width, width)
            self.av_fusion = nn.Linear(2 * config.embed_dim, config.embed_dim)
            self.atm_head = nn.Linear(text_width, 2)
            self.avtm_head = nn.Linear(text_width, 2)
        for encoder in self._frozen():
            encoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "InternVideo2Stage2":
        """Sets the mode of all parts but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for encoder in self._frozen():
            encoder.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        encoders: list[nn.Module] = []
        if self.config.freeze_vision:
            encoders.append(self.vision_encoder)
        if self.config.freeze_audio and self.config.audio is not None:
            encoders.append(self.audio_encoder)
        return encoders

    def temperature(self) -> torch.Tensor:
        """Returns the scalar tau by which cosines are divided, after putting it within its bounds."""
        with torch.no_grad():
            # The parameter itself, as published: a clamp in the graph would stop its gradient.
            self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
        return self.temp

    def see(self, frames_BTCHW: torch.Tensor, visible_BV: torch.Tensor | None = None) -> Media:
        """Encodes clips, or images where T is 1.

        Args:
            frames_BTCHW: float32, normalised.
            visible_BV: int64 numbers of the patches that are seen; None sees all.
        """
        with torch.no_grad() if self.config.freeze_vision else nullcontext():
            tokens_BNS, pooled = self.vision_encoder(frames_BTCHW, visible_BV)
        if self.config.audio is not None:
            tokens_BNS = self.av_concat_vision_proj(tokens_BNS)
        return Media(tokens_BNS, self.vision_proj(pooled))

    def hear(self, fbank_BFM: torch.Tensor) -> Media:
        """Encodes sounds, float32 and normalised: 998 frames of 64 bins in the released model."""
        with torch.no_grad() if self.config.freeze_audio else nullcontext():
            tokens = self.audio_encoder.hear(fbank_BFM)
        return Media(self.av_concat_audio_proj(tokens), self.audio_proj(tokens.mean(dim=1)))

    def together(self, heard: Media, seen: Media) -> Media:
        """Returns sound and video as one: the sound's tokens come first."""
        feature_BE = self.av_fusion(torch.cat([heard.feature, seen.feature], dim=1))
        return Media(torch.cat([heard.tokens, seen.tokens], dim=1), feature_BE)

    def text_states(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns the states of texts that have looked at nothing yet, [B, L, D]."""
        return self.text_encoder.read(tokens_BL)

    def text_feature(self, states_BLD: torch.Tensor) -> torch.Tensor:
        """Returns texts in the shared space, [B, E], not of unit length."""
        return self.text_proj(states_BLD[:, 0])

    def judge(
        self,
        head: Head,
        media_BNS: torch.Tensor,
        states_BLD: torch.Tensor,
        tokens_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Returns logits [B, 2]: that text and media do not belong together, and that they do."""
        fused_BLD = self.text_encoder.fuse(states_BLD, tokens_BL, media_BNS)
        return self.get_submodule(head)(fused_BLD[:, 0])

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; T may be 1."""
        return F.normalize(self.see(frames_BTCHW).feature.float(), dim=-1)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return F.normalize(self.text_feature(self.text_states(tokens_BL)).float(), dim=-1)

    def video_tokens(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns what `match` reads of clips, [B, N, S]."""
        return self.see(frames_BTCHW).tokens

    def match(
        self, video_BNS: torch.Tensor, states_BLD: torch.Tensor, tokens_BL: torch.Tensor
    ) -> torch.Tensor:
        """Returns the probability that each clip and text belong together, float32 [B]."""
        logits_B2 = self.judge("itm_head", video_BNS, states_BLD, tokens_BL)
        return logits_B2.float().softmax(dim=1)[:, 1]


def _to_decoder(width: int, decoder_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, decoder_width), nn.LayerNorm(decoder_width))


_NOT_NEEDED = re.compile(
    r"vision_encoder\.(clip_decoder\.|final_clip_decoder\.|clip_pos_embed$|clip_img_pos_embed$)"
    r"|clip_teacher\.|audio_encoder\.predictor\."
)
"""Weights of a published file that only distillation, or the naming of sounds, has a use for."""

_ABSENT = ("atm_head.weight", "atm_head.bias")
"""The released runs do not match sound alone with text, so that their files lack the head."""

_TEXT, _AUDIO = "text_encoder.", "audio_encoder."


def load_published_stage2(
    source: str | Path | Mapping[str, Any],
    config: InternVideo2Stage2Config,
    num_frames: int | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the weights of `InternVideo2Stage2` out of a published file, in float32.

    The 1B model's file (``InternVideo2-stage2_1b-224p-f4.pt``) holds vision and text, the 6B model's
    sound too. ``atm_head`` may be absent, and then starts at zero: it finds everything as likely as not.

    Args:
        source: A file, or what ``torch.load`` gives of one; weights may lie under ``module`` or ``model``.
        config: Shape of the network to load into. Positions are stretched to its frames and grid.
        num_frames: Frames of the file's positions, 4 in all released ones. None lets their number tell.

    Raises:
        DependencyError: Naming weights that are missing, unknown, of another shape, or that are stored
            twice and differ.
    """
    try:
        state = _own_names(published_state(source), config)
    except ValueError as error:
        raise DependencyError(
            f"Weights do not fit InternVideo2's second stage: {error}",
            "check the file and the model's shape in the recipe",
        ) from error
    with torch.device("meta"):
        wanted = InternVideo2Stage2(config).state_dict()
    absent = [name for name in _ABSENT if name in wanted and name not in state]
    if absent:
        logger.warning("the file lacks %s: it starts at zero", " and ".join(absent))
        state |= {name: torch.zeros(wanted[name].shape) for name in absent}
    state = stretch_positions(state, config.vision, num_frames)
    return fit_published(state, wanted, _NOT_NEEDED)


def published_stage2(
    state: Mapping[str, torch.Tensor], config: InternVideo2Stage2Config
) -> dict[str, torch.Tensor]:
    """Returns the weights of an `InternVideo2Stage2` under the names of a published file.

    The inverse of `load_published_stage2` for a file of the config's own frames: what is stored twice
    there is stored twice again.
    """
    text, published = {}, {}
    for name, tensor in state.items():
        if name.startswith(_TEXT):
            text[name.removeprefix(_TEXT)] = tensor
        elif name.startswith(_AUDIO):
            assert config.audio is not None
            keys = beats.published_keys(name.removeprefix(_AUDIO), config.audio.layers)
            published |= {f"{_AUDIO}{key}": tensor.clone() for key in keys}
        else:
            published[name] = tensor
    return published | {f"{_TEXT}{name}": tensor for name, tensor in published_bert(text).items()}


def _own_names(
    published: Mapping[str, torch.Tensor], config: InternVideo2Stage2Config
) -> dict[str, torch.Tensor]:
    """Returns a published file's weights under the names of `InternVideo2Stage2`; others stay as they are.

    Raises:
        ValueError: If a weight that is stored more than once differs from its copy.
    """
    text = {k.removeprefix(_TEXT): v for k, v in published.items() if k.startswith(_TEXT)}
    state = {name: value for name, value in published.items() if not name.startswith(_TEXT)}
    state |= {f"{_TEXT}{name}": value for name, value in plain_bert(text).items()}
    if config.audio is None:
        return state
    with torch.device("meta"):
        names = beats.Beats(config.audio).state_dict()
    for name in names:
        keys = [f"{_AUDIO}{key}" for key in beats.published_keys(name, config.audio.layers)]
        found = [(key, state.pop(key)) for key in keys if key in state]
        for key, copy in found[1:]:
            if not torch.equal(copy, found[0][1]):
                raise ValueError(f"differing copies {found[0][0]} and {key}")
        if found:
            state[f"{_AUDIO}{name}"] = found[0][1]
    return state
