# SPDX-License-Identifier: Apache-2.0
# Outcomes may be other kinds of models; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false
"""First weights: every family of files, made here at random in the published formats."""

import json
import logging
import sys
import zipfile
from types import ModuleType

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks import bert
from dataengine.networks.bert import Bert
from dataengine.networks.config import BertConfig, InternVideo2Config
from dataengine.networks.internvideo2 import InternVideo2, InternVideo2Classifier, resize_positions
from dataengine.networks.internvideo2_clip import InternVideo2Clip
from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2, published_stage2
from dataengine.networks.text import tokenise
from dataengine.networks.viclip import ViCLIP
from tests.tiny_beats import write_checkpoint as write_beats
from training import checkpoint
from training.models import build_task
from training.models.filling import read_weights
from training.models.init import initialise
from training.models.open_clip_model import OpenClipDualEncoder
from training.models.published import plain_llama
from training.models.task import Task

SENTINEL = 12345.0

VISION = {
    "image_size": 28, "patch_size": 14, "num_frames": 4, "width": 32, "layers": 2, "heads": 2,
    "mlp_width": 64, "pool_heads": 2, "embed_dim": 16,
}  # fmt: skip
MOBILE = {
    "kind": "internvideo2_clip", "vision": VISION, "embed_dim": 8,
    "text": {
        "kind": "mobileclip", "vocab_size": 64, "context_length": 12, "width": 16, "layers": 2,
        "heads": 2, "mlp_width": 32,
    },
}  # fmt: skip
LLAMA = {
    "kind": "internvideo2_clip", "vision": VISION, "embed_dim": 16,
    "text": {
        "kind": "llama", "vocab_size": 64, "context_length": 12, "width": 16, "layers": 2,
        "heads": 2, "mlp_width": 32,
    },
}  # fmt: skip
BERT = {
    "vocab_size": 64, "width": 16, "layers": 3, "fusion_layer": 2, "heads": 2, "mlp_width": 32,
    "max_positions": 16, "mask_id": 5,
}  # fmt: skip
STAGE2 = {
    "kind": "internvideo2_stage2", "vision": VISION, "text": BERT, "embed_dim": 8,
    "context_length": 12,
}  # fmt: skip
AUDIO = {
    "embed_dim": 24, "width": 32, "mlp_width": 48, "layers": 2, "heads": 4, "conv_pos": 16,
    "conv_pos_groups": 4, "num_buckets": 20, "max_distance": 40,
}  # fmt: skip
TEACHER = {"kind": "internvideo2", "vision": VISION}
DISTIL = {
    "kind": "internvideo2_distil", "student": VISION, "clip_teacher": TEACHER,
    "num_clip_layers": 1, "mask": "random",
}  # fmt: skip


@pytest.fixture
def build(recipe):
    """Returns a function: a model and its init -> the task, all of it a sentinel, and the recipe."""

    def make(init, model=None, **overrides):
        more = {"model": model} if model else {}
        entries = init if isinstance(init, list) else [init]
        config = recipe(**more, **overrides, init=entries)
        task = build_task(config)
        with torch.no_grad():
            for tensor in task.network.state_dict().values():
                tensor.fill_(SENTINEL)
        return task, config

    return make


def fresh(task: Task) -> set[str]:
    """Returns the names of what still holds the sentinel."""
    return {n for n, tensor in task.network.state_dict().items() if (tensor == SENTINEL).any()}


def random_state(module: nn.Module, seed=0) -> dict[str, torch.Tensor]:
    """Returns weights of a module's names and shapes, none of them of an initial value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in module.state_dict().items()
    }


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def vision(**changes):
    return InternVideo2Config(**{**VISION, **changes})


# --- CLIP

CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_clip(**changes):
    torch.manual_seed(0)
    described = {**CLIP, **changes}
    clip = open_clip.CLIP(**described).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        clip.logit_scale.fill_(3.0)
    return clip, described


def clip_folder(folder, state=None, **changes):
    clip, described = make_clip(**changes)
    folder.mkdir()
    save_file(state or clip.state_dict(), folder / "open_clip_model.safetensors")
    about = {"model_cfg": described, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return clip


def test_viclip_of_a_clip_is_that_clip_on_images_and_texts(build, tmp_path):
    clip = clip_folder(tmp_path / "clip")
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip")})
    initialise(task, config)
    temporal = "vision_encoder.temporal_positional_embedding"
    assert fresh(task) == {temporal, "temp"}
    with torch.no_grad():
        task.network.get_parameter(temporal).zero_()
        task.network.temp.fill_(0.01)
        network = task.network.eval()
        image = torch.randn(2, 3, 32, 32)
        expected = clip.encode_image(image, normalize=True)
        torch.testing.assert_close(network.encode_video(image[:, None]), expected)
        tokens = tokenise(["a red square", "two dogs"], 16)
        longer = torch.nn.functional.pad(tokens, (0, 24 - 16))
        expected = clip.encode_text(longer, normalize=True)
        torch.testing.assert_close(network.encode_text(tokens), expected)


def test_a_task_without_the_sentinel_keeps_its_temporal_embedding_at_zero(recipe, tmp_path):
    clip_folder(tmp_path / "clip")
    config = recipe(init=[{"kind": "clip", "path": str(tmp_path / "clip")}])
    task = build_task(config)
    initialise(task, config)
    assert not task.network.vision_encoder.temporal_positional_embedding.any()
    assert task.network.temp.item() == pytest.approx(0.1)


def test_spatial_positions_are_resized_and_text_positions_padded(build, tmp_path):
    wide = {**CLIP["vision_cfg"], "image_size": 64}
    short = {**CLIP["text_cfg"], "context_length": 10}
    clip = clip_folder(tmp_path / "clip", vision_cfg=wide, text_cfg=short)
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip")})
    initialise(task, config)
    table = task.network.vision_encoder.positional_embedding
    assert table.shape == (5, 32)
    assert torch.equal(table[0], clip.visual.positional_embedding[0])
    # Each of the four is drawn from its own quarter of the old sixteen.
    quarters = (
        clip.visual.positional_embedding[1:].view(2, 2, 2, 2, 32).mean(dim=(1, 3)).flatten(0, 1)
    )
    assert torch.corrcoef(torch.stack([table[1], quarters[0]]))[0, 1] > 0.8
    words = task.network.text_encoder.positional_embedding
    assert torch.equal(words[:10], clip.positional_embedding)
    assert not words[10:].any()


@pytest.mark.parametrize("changed", ["missing", "extra", "shape", "nan"])
def test_a_clip_that_does_not_fit_is_refused_by_name(build, tmp_path, changed):
    clip, _ = make_clip()
    state = dict(clip.state_dict())
    match changed:
        case "missing":
            del state["visual.ln_pre.bias"]
            message = "missing vision_encoder.ln_pre.bias"
        case "extra":
            state["visual.trunk.weight"] = torch.zeros(1)
            message = "unexpected vision_encoder.trunk.weight"
        case "shape":
            state["ln_final.bias"] = torch.zeros(7)
            message = r"of another shape text_encoder.ln_final.bias \[7\] instead of \[16\]"
        case _:
            state["ln_final.bias"] = torch.full((16,), torch.nan)
            message = "not finite text_encoder.ln_final.bias"
    clip_folder(tmp_path / "clip", state)
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip")})
    with pytest.raises(ConfigError, match=message):
        initialise(task, config)
    assert fresh(task) == set(task.network.state_dict())


def test_a_clip_of_the_exact_gelu_is_refused_by_viclip(build, tmp_path):
    clip_folder(tmp_path / "clip", quick_gelu=False)
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip")})
    with pytest.raises(ConfigError, match="exact GELU"):
        initialise(task, config)


def test_a_file_alone_must_tell_its_gelu(build, tmp_path, monkeypatch):
    clip, described = make_clip()
    state = {**clip.state_dict()}
    torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "clip.pt")
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip.pt")})
    with pytest.raises(ConfigError, match="does not tell which GELU") as caught:
        initialise(task, config)
    assert "ViT-B-16-quickgelu@FILE" in caught.value.hint
    monkeypatch.setattr(open_clip, "get_model_config", {"Tiny": described}.get)
    task, config = build({"kind": "clip", "path": f"Tiny@{tmp_path / 'clip.pt'}"})
    initialise(task, config)
    assert torch.equal(task.network.vision_encoder.proj, state["visual.proj"])
    task, config = build({"kind": "clip", "path": f"Other@{tmp_path / 'clip.pt'}"})
    with pytest.raises(ConfigError, match="no architecture Other"):
        initialise(task, config)
    task, config = build({"kind": "clip", "path": "Tiny@no-such-tag"})
    with pytest.raises(ConfigError, match="no-such-tag is neither a file nor a tag of Tiny"):
        initialise(task, config)


def test_openais_weights_are_known_by_their_sizes(build, tmp_path):
    heads = {"width": 64, "head_width": 64}
    clip, _ = make_clip(
        vision_cfg={**CLIP["vision_cfg"], **heads}, text_cfg={**CLIP["text_cfg"], "width": 64, "heads": 1}
    )  # fmt: skip
    sizes = {"input_resolution": 32, "context_length": 24, "vocab_size": 49408}
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    state |= {name: torch.tensor(size) for name, size in sizes.items()}
    torch.save(state, tmp_path / "ViT.pt")
    init = {"kind": "clip", "path": str(tmp_path / "ViT.pt")}
    shape = {
        "model__video__width": 64, "model__video__heads": 1,
        "model__text__width": 64, "model__text__heads": 1,
    }  # fmt: skip
    task, config = build(init, **shape)
    initialise(task, config)
    assert fresh(task) == {"vision_encoder.temporal_positional_embedding", "temp"}
    task, config = build(init, **{**shape, "model__text__heads": 2})
    with pytest.raises(ConfigError, match="1 heads where the model has 2"):
        initialise(task, config)


def test_a_program_with_weights_is_not_run(build, tmp_path):
    # What marks TorchScript, as OpenAI's files are.
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as file:
        file.writestr("clip/constants.pkl", b"")
        file.writestr("clip/data.pkl", b"")
    task, config = build({"kind": "clip", "path": str(tmp_path / "clip.pt")})
    with pytest.raises(ConfigError, match="weights alone") as caught:
        initialise(task, config)
    assert "torch.jit.load" in caught.value.hint


def test_open_clip_model_takes_a_clip_whole(build, recipe, tmp_path):
    clip = clip_folder(tmp_path / "clip")
    model = recipe().model.model_dump() | {"kind": "open_clip", "quick_gelu": True}
    del model["freeze_text"]
    init = {"kind": "clip", "path": str(tmp_path / "clip")}
    task, config = build(init, model)
    initialise(task, config)
    assert fresh(task) == set()
    assert isinstance(task.network, OpenClipDualEncoder)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.encode_image(image, normalize=True)
        torch.testing.assert_close(task.network.eval().encode_video(image[:, None]), expected)
    task, config = build(init, model | {"quick_gelu": False})
    with pytest.raises(ConfigError, match="sigmoid GELU") as caught:
        initialise(task, config)
    assert "model.quick_gelu=true" in caught.value.hint


# --- Published files


def test_viclips_file_with_another_number_of_frames(build, recipe, tmp_path):
    published = ViCLIP(recipe(model__video__num_frames=4).model)
    state = random_state(published)
    module = ModuleType("utils.easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    payload = {
        "model": prefixed("module.", state),
        "config": module.EasyDict(epochs=3),
        "global_step": 70,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "utils", ModuleType("utils"))
        patch.setitem(sys.modules, "utils.easydict", module)
        torch.save(payload, tmp_path / "ViClip.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "ViClip.pth")})
    initialise(task, config)
    assert fresh(task) == set()
    own = task.network.state_dict()
    temporal = "vision_encoder.temporal_positional_embedding"
    assert torch.equal(own[temporal], state[temporal][:, :2])
    del state[temporal]
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def stage1_file(path, num_frames=8):
    """A stage-1 file: the encoder, and what only its distillation needs."""
    state = random_state(InternVideo2(vision(num_frames=num_frames)))
    num_patches = 4 * num_frames
    extras = {
        "clip_pos_embed": torch.randn(1, 1 + num_patches, 32),
        "mae_pos_embed": torch.randn(1, num_patches, 32),
        "clip_decoder.0.head.weight": torch.randn(9, 32),
        "final_clip_decoder.head.weight": torch.randn(9, 16),
        "mae_decoder.0.head.0.weight": torch.randn(32, 32),
    }
    torch.save({"module": {**state, **extras}, "epoch": 300}, path)
    return state


@pytest.mark.parametrize(
    ("model", "prefix"), [(MOBILE, "vision_encoder."), (STAGE2, "vision_encoder.")]
)
def test_a_stage_1_encoder_into_the_later_stages(build, tmp_path, caplog, model, prefix):
    state = stage1_file(tmp_path / "pretrain.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "pretrain.pth")}, model)
    with caplog.at_level(logging.INFO):
        initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {name for name in own if not name.startswith(prefix)}
    expected = resize_positions(state.pop("pos_embed"), 4, 8, 2)
    torch.testing.assert_close(own[f"{prefix}pos_embed"], expected)
    assert all(torch.equal(own[prefix + name], tensor) for name, tensor in state.items())
    assert f"{len(state) + 1} tensors into vision_encoder ({len(state) + 1})" in caplog.text
    assert "not needed: clip_decoder (1), clip_pos_embed (1)" in caplog.text


def test_a_stage_1_file_into_a_student_of_other_teachers(build, tmp_path):
    stage1_file(tmp_path / "pretrain.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "pretrain.pth")}, DISTIL)
    initialise(task, config)
    decoders = ("clip_decoder", "final_clip_decoder", "clip_pos_embed")
    assert fresh(task) == {n for n in task.network.state_dict() if n.startswith(decoders)}


def test_decoders_of_another_width_stay_fresh(build, recipe, tmp_path):
    wider = {"kind": "internvideo2", "vision": {**VISION, "width": 64}}
    student = build_task(recipe(model={**DISTIL, "clip_teacher": wider})).network
    torch.save({"model": random_state(student)}, tmp_path / "student.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "student.pth")}, DISTIL)
    initialise(task, config)
    decoders = ("clip_decoder", "final_clip_decoder", "clip_pos_embed")
    assert fresh(task) == {n for n in task.network.state_dict() if n.startswith(decoders)}


def test_a_student_goes_on_with_its_own_decoders(build, recipe, tmp_path):
    student = build_task(recipe(model=DISTIL)).network
    state = random_state(student)
    torch.save({"model": state}, tmp_path / "student.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "student.pth")}, DISTIL)
    initialise(task, config)
    assert fresh(task) == set()
    own = task.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def test_a_fine_tuned_classifier_gives_its_encoder(build, tmp_path):
    state = random_state(InternVideo2Classifier(vision(), 5))
    torch.save(state, tmp_path / "B14_ft_k710_f8.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "B14_ft_k710_f8.pth")}, MOBILE)
    initialise(task, config)
    assert {name.split(".")[0] for name in fresh(task)} == {"vision_align", "text_encoder", "temp"}


def test_frames_that_the_shape_does_not_tell_must_be_said(build, tmp_path):
    # Two frames of 4 x 4 patches are as many as eight of 2 x 2.
    state = random_state(InternVideo2(vision(num_frames=3, image_size=56)))
    torch.save(state, tmp_path / "v.pth")
    init = {"kind": "weights", "path": str(tmp_path / "v.pth")}
    task, config = build(init, MOBILE)
    with pytest.raises(ConfigError, match="do not tell its frames") as caught:
        initialise(task, config)
    assert "init.num_frames" in caught.value.hint
    task, config = build({**init, "num_frames": 3}, MOBILE)
    initialise(task, config)
    expected = resize_positions(state["pos_embed"], 4, 3, 2)
    torch.testing.assert_close(task.network.vision_encoder.pos_embed.data, expected)


def stage2_file(path, config):
    state = random_state(InternVideo2Stage2(config))
    published = published_stage2(state, config)
    published |= {"vision_encoder.clip_pos_embed": torch.randn(1, 17, 32)}
    torch.save({"module": published}, path)
    return state


def test_stage_2s_file_whole_and_its_encoder_alone(build, recipe, tmp_path):
    path = tmp_path / "stage2.pt"
    config = recipe(model=STAGE2).model
    state = stage2_file(path, config)
    task, recipe_ = build({"kind": "weights", "path": str(path)}, STAGE2)
    initialise(task, recipe_)
    assert fresh(task) == set()
    own = task.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    eight = {**MOBILE, "vision": {**VISION, "num_frames": 8}}
    task, recipe_ = build({"kind": "weights", "path": str(path)}, eight)
    initialise(task, recipe_)
    own = task.network.state_dict()
    assert {name.split(".")[0] for name in fresh(task)} == {"vision_align", "text_encoder", "temp"}
    expected = resize_positions(state["vision_encoder.pos_embed"], 8, 4, 2)
    torch.testing.assert_close(own["vision_encoder.pos_embed"], expected)


def test_a_bert_into_stage_2_leaves_its_cross_attention_fresh(build, tmp_path):
    plain = Bert(BertConfig(**BERT), 32)
    state = {n: t for n, t in random_state(plain).items() if ".crossattention." not in n}
    words, bias = state["bert.embeddings.word_embeddings.weight"], state["cls.predictions.bias"]
    copies = {
        "cls.predictions.decoder.weight": words.clone(),
        "cls.predictions.decoder.bias": bias.clone(),
    }
    unneeded = {"bert.pooler.dense.weight": torch.zeros(16, 16)}
    (tmp_path / "bert").mkdir()
    save_file({**state, **copies, **unneeded}, tmp_path / "bert" / "model.safetensors")
    task, config = build({"kind": "weights", "path": str(tmp_path / "bert")}, STAGE2)
    initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {
        name for name in own if not name.startswith("text_encoder.") or ".crossattention." in name
    }
    assert torch.equal(own["text_encoder.bert.embeddings.word_embeddings.weight"], words)


def test_a_name_on_the_hub_is_a_berts(build, monkeypatch):
    state = {
        n: t for n, t in random_state(Bert(BertConfig(**BERT), 32)).items() if ".cross" not in n
    }
    asked = []
    monkeypatch.setattr(bert, "_read", lambda source: asked.append(source) or state)
    init = {"kind": "weights", "path": "google-bert/bert-large-uncased"}
    task, config = build(init, STAGE2)
    initialise(task, config)
    assert asked == ["google-bert/bert-large-uncased"]
    own = task.network.state_dict()
    assert all(torch.equal(own[f"text_encoder.{name}"], tensor) for name, tensor in state.items())
    task, config = build(init, MOBILE)
    with pytest.raises(ConfigError, match="holds a BERT, for which the model has no part"):
        initialise(task, config)
    task, config = build({**init, "path": "weights/absent.pth"}, STAGE2)
    with pytest.raises(ConfigError, match=r"no weights at weights/absent.pth"):
        initialise(task, config)


def test_beats_into_stage_2(build, tmp_path):
    write_beats(tmp_path / "beats.pt", seed=3, labels={0: "/m/a", 1: "/m/b"})
    init = {"kind": "weights", "path": str(tmp_path / "beats.pt")}
    task, config = build(init, {**STAGE2, "audio": AUDIO, "fusion_width": 16})
    initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {name for name in own if not name.startswith("audio_encoder.")}
    wider = {**STAGE2, "audio": {**AUDIO, "max_distance": 80}, "fusion_width": 16}
    task, config = build(init, wider)
    with pytest.raises(ConfigError, match="max_distance 40 instead of 80"):
        initialise(task, config)


def mobileclip_state(seed=0, context=20):
    config = {**MOBILE, "text": {**MOBILE["text"], "context_length": context}}
    return random_state(_clip_network(config).text_encoder, seed)


def _clip_network(model) -> InternVideo2Clip:
    from dataengine.networks.config import InternVideo2ClipConfig

    return InternVideo2Clip(InternVideo2ClipConfig.model_validate(model))


def test_mobileclips_text_tower(build, tmp_path):
    text = mobileclip_state()
    image = {"image_encoder.model.stem.weight": torch.zeros(3), "logit_scale": torch.tensor(4.6)}
    torch.save({**prefixed("text_encoder.", text), **image}, tmp_path / "mobileclip_blt.pt")
    init = {"kind": "weights", "path": str(tmp_path / "mobileclip_blt.pt")}
    task, config = build(init, MOBILE)
    initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {name for name in own if not name.startswith("text_encoder.")}
    name = "positional_embedding.pos_embed.pos_embed"
    assert torch.equal(own[f"text_encoder.{name}"], text[name][:, :, :12])
    task, config = build(init, LLAMA)
    with pytest.raises(ConfigError, match="holds a MobileCLIP, for which the model has no part"):
        initialise(task, config)


def llama_state():
    text = random_state(_clip_network(LLAMA).text_encoder)
    rotary = {
        f"transformer.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4)
        for layer in (0, 1)
    }
    return text, rotary


def test_internvls_text_encoder_even_as_peft_renames_it(build, tmp_path):
    text, rotary = llama_state()
    image = {
        "patch_embed.proj.weight": torch.zeros(32, 3, 14, 14),
        "blocks.0.norm1.weight": torch.zeros(32),
        "logit_scale": torch.tensor(4.6),
        "clip_projector.cross_attn.q_bias": torch.zeros(32),
    }
    torch.save({"module": {**text, **rotary, **image}}, tmp_path / "internvl.pth")
    adapted = {
        name.replace("q_proj.weight", "q_proj.base_layer.weight"): tensor
        for name, tensor in text.items()
    }
    torch.save({"module": {**adapted, **rotary, **image}}, tmp_path / "peft.pth")
    for file in ("internvl.pth", "peft.pth"):
        task, config = build({"kind": "weights", "path": str(tmp_path / file)}, LLAMA)
        initialise(task, config)
        own = task.network.state_dict()
        assert fresh(task) == {name for name in own if not name.startswith("text_encoder.")}
        assert all(torch.equal(own[f"text_encoder.{n}"], tensor) for n, tensor in text.items())
    del text["transformer.layers.1.self_attn.q_proj.weight"]
    torch.save(text, tmp_path / "cut.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "cut.pth")}, LLAMA)
    with pytest.raises(
        ConfigError, match=r"missing text_encoder.transformer.layers.1.self_attn.q_proj"
    ):
        initialise(task, config)


def test_low_rank_changes_are_added():
    matrix, down, up = torch.randn(6, 5), torch.randn(16, 5), torch.randn(6, 16)
    state = {
        "q_proj.base_layer.weight": matrix,
        "q_proj.lora_A.default.weight": down,
        "q_proj.lora_B.default.weight": up,
    }
    plain = plain_llama(state)
    assert plain.keys() == {"q_proj.weight"}
    x = torch.randn(3, 5)
    expected = x @ matrix.T + (x @ down.T @ up.T) * 32 / 16
    torch.testing.assert_close(x @ plain["q_proj.weight"].T, expected)


def test_the_few_tensors_of_a_clip_file_come_last(build, tmp_path):
    """The three files of InternVideo2-CLIP 1B, in their order; together they leave nothing fresh."""
    torch.save({"module": stage1_file(tmp_path / "v.pth", num_frames=4)}, tmp_path / "v.pth")
    text, rotary = llama_state()
    torch.save({"module": text}, tmp_path / "text.pth")
    projector = {
        f"vision_encoder.{name}": tensor
        for name, tensor in random_state(InternVideo2(vision()), seed=7).items()
        if name.startswith("clip_projector.")
    }
    assert len(projector) == 14
    delta = {**projector, **prefixed("text_encoder.", rotary), "temp": torch.tensor(0.02)}
    torch.save({"module": delta}, tmp_path / "clip.pth")
    names = ("v.pth", "text.pth", "clip.pth")
    init = [{"kind": "weights", "path": str(tmp_path / name)} for name in names]
    task, config = build(init, LLAMA)
    initialise(task, config)
    assert fresh(task) == set()
    own = task.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in projector.items())
    assert own["temp"].item() == pytest.approx(0.02)
    del delta["vision_encoder.clip_projector.cross_attn.q_bias"]
    torch.save({"module": delta}, tmp_path / "clip.pth")
    task, config = build(init, LLAMA)
    with pytest.raises(
        ConfigError, match=r"missing vision_encoder.clip_projector.cross_attn.q_bias"
    ):
        initialise(task, config)


def test_a_whole_small_clip_file(build, tmp_path):
    state = random_state(_clip_network(MOBILE))
    torch.save(state, tmp_path / "clip.pth")
    eight = {**MOBILE, "vision": {**VISION, "num_frames": 8}}
    task, config = build({"kind": "weights", "path": str(tmp_path / "clip.pth")}, eight)
    initialise(task, config)
    assert fresh(task) == set()
    own = task.network.state_dict()
    assert torch.equal(own["vision_align.1.weight"], state["vision_align.1.weight"])
    expected = resize_positions(state["vision_encoder.pos_embed"], 8, 4, 2)
    torch.testing.assert_close(own["vision_encoder.pos_embed"], expected)


def test_what_nothing_is_known_of_is_refused(build, tmp_path):
    torch.save(
        {"model": {"layer.weight": torch.zeros(2), "layer.bias": torch.zeros(2)}},
        tmp_path / "x.pth",
    )
    task, config = build({"kind": "weights", "path": str(tmp_path / "x.pth")})
    with pytest.raises(ConfigError, match=r"it holds layer \(2\)") as caught:
        initialise(task, config)
    assert "the model has vision_encoder" in caught.value.hint
    clip, _ = make_clip()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    task, config = build({"kind": "weights", "path": str(tmp_path / "clip.safetensors")})
    with pytest.raises(ConfigError, match="holds a CLIP") as caught:
        initialise(task, config)
    assert "init.kind: clip" in caught.value.hint
    stage1_file(tmp_path / "v.pth")
    task, config = build({"kind": "weights", "path": str(tmp_path / "v.pth")})
    with pytest.raises(
        ConfigError, match="InternVideo2 vision encoder, for which the model has no part"
    ):
        initialise(task, config)
    task, config = build({"kind": "clip", "path": str(tmp_path / "v.pth")})
    with pytest.raises(ConfigError, match="is no CLIP"):
        initialise(task, config)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"model": {"x": torch.zeros(1)}, "config": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="weights alone") as caught:
        read_weights(tmp_path / "evil.pth")
    assert "weights_only=False" in caught.value.hint
    assert not (tmp_path / "ran").exists()
    for path, message in ((tmp_path / "no.pth", "no weights at"), (tmp_path, "holds neither")):
        with pytest.raises(ConfigError, match=message):
            read_weights(path)


@pytest.mark.parametrize("name", ["notes.pth", "notes", "notes.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"root:x:0:0:root:/root:/bin/bash\n", bytes(99)],
    ids=["empty", "text", "zeros"],
)
def test_what_is_no_file_of_weights_is_called_so(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is no file of weights$") as caught:
        read_weights(tmp_path / name)
    assert "trust" not in caught.value.hint


def test_frozen_weights_that_nothing_was_loaded_into_are_told(recipe, caplog):
    config = recipe(model__freeze_text=True)
    with caplog.at_level(logging.WARNING):
        initialise(build_task(config), config)
    assert "frozen and random" in caplog.text
    assert "text_encoder" in caplog.text


# --- Runs


def write_run(folder, config, state, ema=None):
    writer = checkpoint.Writer(folder, keep=1)
    tensors = prefixed("model.network.", state) | prefixed("ema.network.", ema or {})
    writer.save(3, tensors, {"config": config.model_dump(mode="json")})
    writer.close()


def test_a_run_of_the_same_kind(build, recipe, tmp_path):
    config = recipe()
    state = random_state(ViCLIP(config.model))
    average = random_state(ViCLIP(config.model), seed=1)
    write_run(tmp_path / "run", config, state, average)
    task, config = build({"kind": "checkpoint", "path": str(tmp_path / "run")})
    initialise(task, config)
    own = task.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in average.items())
    init = {"kind": "checkpoint", "path": str(tmp_path / "run/checkpoints/step_00000003")}
    task, config = build(init, model__video__num_frames=3)
    initialise(task, config)
    assert fresh(task) == set()


def test_a_stage_1_run_and_a_stage_2_run_give_their_encoders(build, recipe, tmp_path):
    eight = {**VISION, "num_frames": 8}
    distil = recipe(
        model={**DISTIL, "student": eight, "clip_teacher": {**TEACHER, "vision": eight}}
    )
    student = random_state(build_task(distil).network)
    write_run(tmp_path / "stage1", distil, student)
    task, config = build({"kind": "checkpoint", "path": str(tmp_path / "stage1")}, STAGE2)
    initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {name for name in own if not name.startswith("vision_encoder.")}
    expected = resize_positions(student["pos_embed"], 4, 8, 2)
    torch.testing.assert_close(own["vision_encoder.pos_embed"], expected)

    stage2 = recipe(model={**STAGE2, "audio": AUDIO, "fusion_width": 16})
    state = random_state(InternVideo2Stage2(stage2.model), seed=2)
    write_run(tmp_path / "stage2", stage2, state)
    task, config = build({"kind": "checkpoint", "path": str(tmp_path / "stage2")}, MOBILE)
    initialise(task, config)
    own = task.network.state_dict()
    assert fresh(task) == {name for name in own if not name.startswith("vision_encoder.")}
    name = "vision_encoder.blocks.1.mlp.fc2.weight"
    assert torch.equal(own[name], state[name])


def test_a_run_of_the_same_kind_with_another_grid(build, recipe, tmp_path):
    """Its recipe tells its frames, which the number of its positions does not."""
    other = {**MOBILE, "vision": {**VISION, "num_frames": 3, "image_size": 56}}
    state = random_state(_clip_network(other))
    write_run(tmp_path / "run", recipe(model=other), state)
    task, config = build({"kind": "checkpoint", "path": str(tmp_path / "run")}, MOBILE)
    initialise(task, config)
    assert fresh(task) == set()
    expected = resize_positions(state["vision_encoder.pos_embed"], 4, 3, 2)
    torch.testing.assert_close(task.network.vision_encoder.pos_embed.data, expected)


def test_an_exported_model(build, recipe, tmp_path):
    model = recipe().model
    state = random_state(ViCLIP(model))
    save_file(state, tmp_path / "model.safetensors")
    about = {"format_version": 1, "kind": "viclip", "model": model.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(about))
    task, config = build({"kind": "checkpoint", "path": str(tmp_path)})
    initialise(task, config)
    own = task.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


def test_a_folder_that_is_no_run(build, tmp_path):
    task, config = build({"kind": "checkpoint", "path": str(tmp_path)})
    with pytest.raises(DependencyError, match="No model in"):
        initialise(task, config)
    task, config = build({"kind": "checkpoint", "path": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="no run and no model"):
        initialise(task, config)
