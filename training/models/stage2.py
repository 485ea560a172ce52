# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's second stage: contrast, matching and masked words, on what a step holds.

InternVideo2 (Wang et al. 2024, arXiv:2403.15377), section 3.2, and the released training code.

B clips, T frames, N tokens of a clip, L tokens of a text, D width, E shared space, P patches, V visible
ones.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError
from dataengine.networks.config import InternVideo2Stage2Config
from dataengine.networks.internvideo2_stage2 import Head, InternVideo2Stage2, Media
from training.config import Stage2Objective
from training.data.batch import Inputs, Pairs
from training.models.task import DualEncoder, Matcher, StepOutput, Task
from training.objectives.contrastive import contrastive_loss
from training.objectives.masked_words import IGNORED, mask_words, masked_word_loss
from training.objectives.matching import draw_negatives, matching_loss

_LOSSES: dict[str, tuple[str, str, str, Head]] = {
    "video": ("vtc", "vtm", "mlm", "itm_head"),
    "audio": ("atc", "atm", "amlm", "atm_head"),
    "both": ("avtc", "avtm", "avmlm", "avtm_head"),
}
"""What a text is held against -> contrast, matching, masked words, and the head that matches."""

_SIGHTS = {
    "video": ("video",),
    "image": ("video",),
    "audio": ("audio",),
    "audio_video": tuple(_LOSSES),
}
"""Kind of a step -> what its texts are held against; ``audio_video`` holds video against audio too."""


class Stage2Task(Task):
    """The second stage's network with all its losses.

    A step of videos or images takes ``vtc``, ``vtm`` and ``mlm``; of sound alone ``atc``, ``atm`` and
    ``amlm``; of both all of them and ``avc``, ``avtc``, ``avtm`` and ``avmlm``. A loss of weight 0 is
    not computed. Rows without sound take no part in a step with sound.

    In training, and unless the vision encoder is frozen, it sees a random part of each clip's patches
    and always the class token. Masks, hidden words and negatives come from torch's default generators.

    Not every parameter has a gradient in every step, so that DDP must look for unused ones: without
    sound in a step, ``audio_encoder``, ``audio_proj``, ``av_concat_audio_proj``, ``av_fusion``,
    ``atm_head`` and ``avtm_head`` have none; with sound alone, ``vision_encoder``, ``vision_proj``,
    ``av_concat_vision_proj`` and ``itm_head``. Of the vision encoder, a video leaves ``img_pos_embed``
    unused and an image ``pos_embed``, where both exist. What only a loss of weight 0 reads never has
    one: a matching head, or the text encoder's last layers and its head for words.

    Args:
        config: The network's shape.
        objective: Weights of the losses, masking, and which rows are no negatives of each other.
    """

    network: InternVideo2Stage2

    def __init__(self, config: InternVideo2Stage2Config, objective: Stage2Objective) -> None:
        super().__init__()
        self.network = InternVideo2Stage2(config)  # pyright: ignore[reportIncompatibleVariableOverride]
        self._config, self._objective = config, objective

    def forward(self, inputs: Inputs) -> StepOutput:
        """Returns this process' share of the losses that the kind of the step calls for.

        Raises:
            ConfigError: If nothing is learnt from such a step, or the network cannot hear.
        """
        kind, tokens_BL, pairs = inputs.kind, inputs.tokens, inputs.pairs
        weights = self._weights(inputs)
        temperature = self.network.temperature()
        numbers = {"temperature": temperature.detach()}
        if inputs.fbank is not None and kind in ("audio", "audio_video"):
            # Silence has a spectrogram too; nothing but zeros is where there is no sound at all.
            heard_B = inputs.fbank.flatten(1).any(dim=1)
            pairs = Pairs(pairs.valid & heard_B, pairs.caption_id, pairs.video_id)
        media = self._media(inputs, weights)
        features = {sight: _unit(parts.feature) for sight, parts in media.items()}
        states_BLD = self.network.text_states(tokens_BL)
        text_BE = _unit(self.network.text_feature(states_BLD))

        # All contrasts, all matchings, all words: the random draws come in the published order.
        losses: dict[str, torch.Tensor] = {}
        for sight, (contrast, _, _, _) in _LOSSES.items():
            if contrast in weights:
                losses[contrast] = contrastive_loss(
                    features[sight], text_BE, temperature, pairs, self._objective
                )
        if "avc" in weights:
            losses["avc"] = contrastive_loss(
                features["audio"], features["video"], temperature, pairs, self._objective
            )
        for sight, (_, matching, _, head) in _LOSSES.items():
            if matching in weights:
                losses[matching], numbers[f"{matching}_accuracy"] = self._match(
                    head, media[sight], features[sight], states_BLD, text_BE, tokens_BL, pairs
                )
        for sight, (_, _, words, _) in _LOSSES.items():
            if words in weights:
                losses[words] = self._find_words(media[sight], tokens_BL, pairs)
        weighted = {name: loss * weights[name] for name, loss in losses.items()}
        return StepOutput(weighted, numbers)

    def _weights(self, inputs: Inputs) -> dict[str, float]:
        """Returns the losses of a step and their weights, none of them 0."""
        kind = inputs.kind
        names = [name for sight in _SIGHTS[kind] for name in _LOSSES[sight][:3]]
        names += ["avc"] if kind == "audio_video" else []
        weights = {name: getattr(self._objective, name) for name in names}
        if not any(weights.values()):
            raise ConfigError(
                f"{kind} steps learn nothing: {', '.join(names)} have weight 0",
                f"give one of them a weight under objective, or take {kind} out of data.mix",
            )
        if kind in ("audio", "audio_video") and self._config.audio is None:
            raise ConfigError(
                f"data.mix has {kind} steps, but model.audio is empty: the model hears nothing",
                "set model.audio, or take them out of data.mix",
            )
        return {name: weight for name, weight in weights.items() if weight}

    def _media(self, inputs: Inputs, weights: dict[str, float]) -> dict[str, Media]:
        """Returns what the losses look at; what none of them does is not encoded."""
        network, used = self.network, {"avc"} & weights.keys()
        wanted = {sight for sight, names in _LOSSES.items() if weights.keys() & set(names[:3])}
        media: dict[str, Media] = {}
        if used or wanted & {"video", "both"}:
            assert inputs.frames is not None
            media["video"] = network.see(inputs.frames, self._visible(inputs))
        if used or wanted & {"audio", "both"}:
            assert inputs.fbank is not None
            media["audio"] = network.hear(inputs.fbank)
        if "both" in wanted:
            media["both"] = network.together(media["audio"], media["video"])
        return media

    def _visible(self, inputs: Inputs) -> torch.Tensor | None:
        """Returns numbers of the patches that are seen, int64 [B, V], rising; None sees all."""
        assert inputs.frames is not None
        objective, (B, T) = self._objective, inputs.frames.shape[:2]
        ratio = objective.image_mask_ratio if T == 1 else objective.video_mask_ratio
        if not self.training or self._config.freeze_vision or not ratio:
            return None
        vision = self._config.vision
        num_patches = T * (vision.image_size // vision.patch_size) ** 2
        num_visible = num_patches - int(ratio * num_patches)
        order_BP = torch.rand(B, num_patches, device=inputs.frames.device).argsort(dim=1)
        return order_BP[:, :num_visible].sort(dim=1).values

    def _match(
        self,
        head: Head,
        media: Media,
        feature_BE: torch.Tensor,
        states_BLD: torch.Tensor,
        text_BE: torch.Tensor,
        tokens_BL: torch.Tensor,
        pairs: Pairs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the matching loss and the share of pairs that were judged rightly."""
        objective = self._objective
        scope = objective.hard_negatives
        negatives = draw_negatives(feature_BE, text_BE, self.network.temp, pairs, objective, scope)

        def judge(
            media_BND: torch.Tensor, states_BLD: torch.Tensor, tokens_BL: torch.Tensor
        ) -> torch.Tensor:
            return self.network.judge(head, media_BND, states_BLD, tokens_BL)

        return matching_loss(judge, media.tokens, states_BLD, tokens_BL, negatives, scope)

    def _find_words(self, media: Media, tokens_BL: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Returns the loss of words that were hidden from a second reading of the texts."""
        text, encoder = self._config.text, self.network.text_encoder
        hidden_BL, labels_BL = mask_words(
            tokens_BL, self._objective.mlm_probability, text.vocab_size, text.mask_id
        )
        asked_BL = (labels_BL != IGNORED) & pairs.valid[:, None]
        # A hidden word may have become padding's id by chance; it is no padding.
        states_BLD = encoder.read(hidden_BL, tokens_BL)
        fused_BLD = encoder.fuse(states_BLD, tokens_BL, media.tokens)
        return masked_word_loss(encoder.predict(fused_BLD[asked_BL]), labels_BL[asked_BL])

    def dual_encoder(self) -> DualEncoder:
        """Returns itself."""
        return self

    def matcher(self) -> Matcher:
        """Returns itself; it judges video and text."""
        return self

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; T may be 1."""
        return self.network.encode_video(frames_BTCHW)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return self.network.encode_text(tokens_BL)

    def video_tokens(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns what `match` reads of clips, [B, N, D]."""
        return self.network.video_tokens(frames_BTCHW)

    def text_states(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns what `match` reads of texts, [B, L, D]."""
        return self.network.text_states(tokens_BL)

    def match(
        self, video_BND: torch.Tensor, text_BLD: torch.Tensor, tokens_BL: torch.Tensor
    ) -> torch.Tensor:
        """Returns the probability that each pair belongs together, float32 [B]."""
        return self.network.match(video_BND, text_BLD, tokens_BL)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of the vision encoder, the text encoder and BEATs, in this order."""
        network = self.network
        blocks = [*network.vision_encoder.blocks, *network.text_encoder.bert.encoder.layer]
        return blocks + (list(network.audio_encoder.blocks) if self._config.audio else [])

    def no_decay(self) -> set[str]:
        """Returns the temperature and the vision encoder's positions and class token, as published.

        The text encoder's embeddings decay.
        """
        return {"temp", "pos_embed", "cls_token"}


def _unit(feature_BE: torch.Tensor) -> torch.Tensor:
    return F.normalize(feature_BE.float(), dim=1)
