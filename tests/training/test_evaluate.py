# SPDX-License-Identifier: Apache-2.0
"""The command on tiny models and folders, and what every process does of it."""

import json
import os
import shutil
import socket
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from dataengine.networks.config import InternVideo2Stage2Config
from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2
from dataengine.networks.viclip import ViCLIP
from training import checkpoint
from training.config import InputSpec, config_from_dict
from training.data.batch import Batch
from training.data.text import build_tokenizer
from training.distributed import World, start
from training.evaluate import _parser, _probe_config, main
from training.evaluation.benchmarks import Folder, label_list
from training.evaluation.clips import Clip, decode, squares
from training.evaluation.encode import Reading, evaluate, in_step
from training.evaluation.loading import initial_weights, load_model
from training.evaluation.measure import _training_features
from training.evaluation.probing import ProbeConfig, frozen_features
from training.export import export_folder
from training.models.open_clip_model import OpenClipDualEncoder
from training.models.task import Task

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 190, 40),
    "blue": (30, 40, 220),
    "white": (240, 240, 240),
}
SPEC = InputSpec(2, 8, "clip", "", 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ALONE = World(0, 1, torch.device("cpu"))


def write_video(path, colour, noise=0, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(4):
            pixels = np.array(colour) + rng.integers(-noise, noise + 1, (32, 48, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Four colours as a list of captions, two texts each; one video is missing, one broken."""
    folder = tmp_path_factory.mktemp("benchmark")
    items = []
    for name, colour in COLOURS.items():
        write_video(folder / "videos" / f"{name}.mp4", colour)
        items.append(
            {"video": f"{name}.mp4", "caption": [f"A {name} square.", f"{name}, all of it"]}
        )
    (folder / "broken.mp4").write_bytes(b"nothing" * 50)
    items += [{"video": f"{name}.mp4", "caption": f"a {name} one"} for name in ("broken", "gone")]
    (folder / "test.json").write_text(json.dumps(items))
    options = list(COLOURS)
    questions = [
        {"video": f"{name}.mp4", "caption": options, "answer": number}
        for number, name in enumerate(COLOURS)
    ]
    (folder / "msrvtt_mc_test.json").write_text(json.dumps(questions))
    return folder


def save_viclip(recipe, folder, seed=0):
    torch.manual_seed(seed)
    model = recipe().model
    export_folder(ViCLIP(model).state_dict(), model, folder)
    return folder


@pytest.fixture
def model(recipe, tmp_path):
    return save_viclip(recipe, tmp_path / "model")


@pytest.fixture
def run(tmp_path, capsys):
    """Returns a function: arguments -> what the command wrote as JSON, and what it printed."""

    def call(*arguments, code=0):
        file = tmp_path / "numbers.json"
        file.unlink(missing_ok=True)
        assert main([*map(str, arguments), "--json", str(file)]) == code, capsys.readouterr().err
        printed = capsys.readouterr()
        return (json.loads(file.read_text()) if file.exists() else None), printed.err + printed.out

    return call


def encoded_by_hand(model, benchmark, texts):
    """Features of the four videos and of texts, by the network itself."""
    network, spec = load_model(model).task.network, load_model(model).spec
    assert isinstance(network, ViCLIP)
    clips = [
        squares(decode(Clip(name, benchmark / "videos" / f"{name}.mp4"), 2)[0], 32, 1)[0]
        for name in COLOURS
    ]
    mean, std = torch.tensor(spec.pixel_mean), torch.tensor(spec.pixel_std)
    frames = ((torch.from_numpy(np.stack(clips)).float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        tokens = build_tokenizer(spec)(texts)
        return network.encode_video(frames), network.encode_text(tokens)


# Retrieval


def test_retrieval_on_a_benchmark_is_what_the_network_says(model, benchmark, run):
    found, printed = run(model, "--benchmark", "captions", "--folder", benchmark, "--workers", 1)
    texts = [text for name in COLOURS for text in (f"a {name} square", f"{name} all of it")]
    video, text = encoded_by_hand(model, benchmark, texts)
    similarity = text @ video.T
    best = similarity.argmax(dim=1) == torch.arange(4).repeat_interleave(2)
    assert found["results"]["text_to_video"]["r1"] == pytest.approx(best.float().mean().item())
    best = similarity.argmax(dim=0) // 2 == torch.arange(4)
    assert found["results"]["video_to_text"]["r1"] == pytest.approx(best.float().mean().item())
    assert (found["clips"], found["clips_listed"], found["texts"]) == (4, 6, 8)
    assert found["left_out"]["gone.mp4"] == "no such file"
    assert found["left_out"]["broken.mp4"].startswith("undecodable")
    assert found["settings"]["benchmark"] == "captions"
    assert found["settings"]["frames"] == 2
    assert found["settings"]["checkpoint"] == str(model)
    assert "evaluated on 4 of 6 clips" in printed
    assert "left out: gone.mp4 (no such file)" in printed
    assert printed.splitlines()[-1].startswith("text->video R@1 ")


def test_dual_softmax_is_asked_for_and_written_down(model, benchmark, run):
    asked = "--benchmark", "captions", "--folder", benchmark
    found, printed = run(model, *asked, "--dual-softmax", "--temperature", 0.01)
    assert found["settings"]["dual_softmax"] is True
    assert found["settings"]["temperature"] == 0.01
    assert "dual softmax" in printed


def test_views_are_averaged(model, benchmark, run):
    asked = "--benchmark", "captions", "--folder", benchmark
    found, _ = run(model, *asked, "--views", 2, "--crops", 3)
    assert found["settings"]["views"] == 2
    assert found["clips"] == 4


def test_paragraphs_and_captions_apart(model, tmp_path, run):
    folder = tmp_path / "anet"
    annotation = {}
    for name, colour in COLOURS.items():
        write_video(folder / f"v_{name}.mp4", colour)
        timestamps, sentences = [[0.2, 0.4], [0.0, 0.2]], [f"{name} later", f"{name} first"]
        annotation[f"v_{name}"] = {"timestamps": timestamps, "sentences": sentences}
    (folder / "val_1.json").write_text(json.dumps(annotation))
    found, _ = run(model, "--benchmark", "activitynet", "--folder", folder)
    assert (found["clips"], found["texts"]) == (4, 4)
    found, _ = run(model, "--benchmark", "activitynet", "--folder", folder, "--captions-apart")
    assert (found["clips"], found["texts"]) == (8, 8)


# Classes, choices, probes


def test_zero_shot_classes(model, tmp_path, run):
    folder = tmp_path / "classes"
    for name, colour in COLOURS.items():
        write_video(folder / f"{name}.mp4", colour)
    (folder / "classes.txt").write_text("\n".join(COLOURS))
    lines = [f"{name}.mp4,{number}" for number, name in enumerate(COLOURS)]
    (folder / "val.csv").write_text("\n".join([*lines, "gone.mp4,0"]))
    found, printed = run(model, "--benchmark", "labels", "--folder", folder)
    assert (found["clips"], found["clips_listed"], found["texts"]) == (4, 5, 4 * 16)
    assert found["results"]["top5"] == 1
    assert found["results"]["chance"] == 0.25
    assert "top-1" in printed


def test_multiple_choice(model, benchmark, run):
    found, _ = run(model, "--benchmark", "msrvtt_mc", "--folder", benchmark)
    video, text = encoded_by_hand(model, benchmark, list(COLOURS))
    expected = ((video @ text.T).argmax(dim=1) == torch.arange(4)).float().mean().item()
    assert found["results"]["accuracy"] == expected
    assert found["results"]["chance"] == 0.25


def test_several_right_options_are_measured_by_precision(model, tmp_path, run):
    folder = tmp_path / "charades"
    items = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        write_video(folder / f"{name}.mp4", colour)
        answer = [int(option in (number, 3)) for option in range(4)]
        items.append({"video": f"{name}.mp4", "option": list(COLOURS), "answer": answer})
    (folder / "charades_mc_test.json").write_text(json.dumps(items))
    found, printed = run(model, "--benchmark", "charades_mc", "--folder", folder)
    assert found["results"]["options"] == 4
    # Option 3 is right for every video, the others for one of four each.
    assert found["results"]["chance"] == pytest.approx((3 * 0.25 + 1) / 4)
    assert 0.25 <= found["results"]["map"] <= 1
    assert "mAP" in printed


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coloured")
    for split, number in (("train", 6), ("val", 3)):
        lines = []
        for label, (name, colour) in enumerate(COLOURS.items()):
            for copy in range(number):
                path = folder / split / f"{split}_{name}_{copy}.mp4"
                write_video(path, colour, noise=40, seed=copy + 10 * len(split))
                lines.append(f"{path.name} {label}")
        (folder / f"{split}.csv").write_text("\n".join([*lines, f"gone_{split}.mp4 1"]))
    (folder / "classes.txt").write_text("\n".join(COLOURS))
    return folder


@pytest.mark.parametrize("how", [["linear"], ["attentive"], ["linear", "--augment"]])
def test_probes_learn_colours_from_random_weights(model, coloured, run, how):
    found, printed = run(
        model, "--benchmark", "labels", "--folder", coloured, "--probe", *how,
        "--epochs", 8, "--lr", 0.5 if how[0] == "linear" else 0.05, "--probe-batch", 8,
    )  # fmt: skip
    assert found["results"]["top1"] > 0.9
    assert found["results"]["clips"] == 12
    assert found["left_out"].keys() == {"gone_train.mp4", "gone_val.mp4"}
    assert "evaluated on 12 of 13 clips" in printed


@pytest.mark.parametrize(("gone", "split"), [("train", "training"), ("val", "test")])
@pytest.mark.parametrize("cache_gb", [1, 1e-9])
def test_a_probe_needs_videos_of_both_splits(
    model, coloured, tmp_path, run, caplog, gone, split, cache_gb
):
    caplog.set_level("INFO")
    shutil.copytree(coloured, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / gone)
    _, printed = run(
        model, "--benchmark", "labels", "--folder", tmp_path / "part", "--probe", "linear",
        "--cache-gb", cache_gb, code=1,
    )  # fmt: skip
    number = {"train": 25, "val": 13}[gone]
    assert f"None of {number} {split} videos can be read; {gone}_red_0.mp4: " in printed
    # It is told before the training that it would waste.
    assert "Traceback" not in printed
    assert "probe  epoch" not in caplog.text


def test_a_probe_needs_an_annotation_of_both_splits(model, coloured, tmp_path, run):
    shutil.copytree(coloured, tmp_path / "part")
    (tmp_path / "part" / "val.csv").write_text("")
    arguments = "--benchmark", "labels", "--folder", tmp_path / "part", "--probe", "linear"
    _, printed = run(model, *arguments, code=1)
    assert "The annotation names no test videos" in printed


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        (["linear"], 3),
        (["linear", "--epochs", "3"], 0.6),
        (["linear", "--epochs", "30"], 3),
        (["attentive"], 5),
        (["attentive", "--epochs", "5"], 1),
    ],
)
def test_a_shorter_probe_warms_up_for_the_same_share(arguments, warmup):
    parser = _parser()
    given = parser.parse_args(["m", "--benchmark", "b", "--folder", "f", "--probe", *arguments])
    assert _probe_config(given).warmup_epochs == pytest.approx(warmup)


@pytest.mark.parametrize("batch_size", [5, 7, 100])
def test_features_that_do_not_fit_are_computed_anew_and_the_same(model, coloured, batch_size):
    loaded = load_model(model)
    reading = Reading(loaded.spec, ALONE, batch_size=3)
    features = frozen_features(loaded.task.network, "linear")
    _, train = label_list(Folder(coloured), "train")
    config = ProbeConfig(batch_size=batch_size)
    kept, anew = {}, {}
    for cache_gb, found in ((1, kept), (1e-9, anew)):
        batches, num_clips, width = _training_features(
            features, train, reading, config, {}, augment=False, cache_gb=cache_gb
        )
        assert width == 16
        assert num_clips == (24 if cache_gb == 1 else 25)
        sizes = []
        for part, labels in batches(0):
            sizes.append(len(labels))
            found |= zip(part[:, 0].tolist(), labels.tolist(), strict=True)
        assert sum(sizes) == 24
        assert set(sizes[:-1]) <= {batch_size}
    assert len(kept) == 24
    assert sorted(kept.values()) == sorted(anew.values())
    assert sorted(kept) == pytest.approx(sorted(anew), abs=1e-6)


# Weights


def test_wise_ft_ends_at_the_two_models(recipe, model, benchmark, tmp_path, run):
    start_model = save_viclip(recipe, tmp_path / "start", seed=1)
    asked = "--benchmark", "captions", "--folder", benchmark
    tuned, _ = run(model, *asked)
    initial, _ = run(start_model, *asked)
    assert tuned["results"] != initial["results"]
    for alpha, expected in ((1, tuned), (0, initial)):
        found, printed = run(model, *asked, "--wise-ft", alpha, "--init", start_model)
        assert found["results"] == expected["results"]
        assert f"wise-ft {float(alpha)}" in printed
    _, printed = run(model, *asked, "--wise-ft", 2, "--init", start_model, code=2)
    assert "between 0 and 1" in printed


def test_wise_ft_reaches_back_to_a_clip(recipe, model, tmp_path):
    clip = recipe(model__kind="open_clip", model__quick_gelu=True).model
    torch.manual_seed(5)
    export_folder(OpenClipDualEncoder(clip).state_dict(), clip, tmp_path / "clip")
    loaded = load_model(model)
    initial = initial_weights(loaded, str(tmp_path / "clip"))
    own = loaded.task.network.state_dict()
    assert initial.keys() == own.keys()
    # A clip's weights are the CLIP's, one for one.
    file = load_file(tmp_path / "clip" / "open_clip_model.safetensors")
    for name, theirs in (
        ("text_encoder.token_embedding.weight", "token_embedding.weight"),
        ("vision_encoder.proj", "visual.proj"),
    ):
        torch.testing.assert_close(initial[name], file[theirs].float())
        assert not torch.equal(initial[name], own[name])


def save_run(recipe, output, seed=0):
    torch.manual_seed(seed)
    config = recipe()
    weights = ViCLIP(config.model).state_dict()
    writer = checkpoint.Writer(output, keep=1)
    tensors = {f"model.network.{name}": weight for name, weight in weights.items()}
    writer.save(3, tensors, {"config": config.model_dump(mode="json")})
    writer.wait()
    return output


def test_a_run_is_evaluated_on_what_it_held_out(recipe, tmp_path, shapes_corpus, run):
    output = save_run(recipe, tmp_path / "run")
    held_out, printed = run(output, "--data", shapes_corpus)
    assert "step_00000003" in printed
    everything, _ = run(output, "--data", shapes_corpus, "--all")
    assert 0 < held_out["clips"] < everything["clips"] == 90
    assert printed.splitlines()[-1].startswith("text->video R@1 ")
    judged, printed = run(output, "--data", shapes_corpus, "--dual-softmax")
    assert judged["clips"] == held_out["clips"]
    assert "dual softmax" in printed


def test_a_run_and_its_model_folder_are_one(recipe, tmp_path, shapes_corpus, model, run):
    of_run, _ = run(save_run(recipe, tmp_path / "run"), "--data", shapes_corpus, "--all")
    of_folder, _ = run(model, "--data", shapes_corpus, "--all")
    assert of_run["results"] == of_folder["results"]
    _, printed = run(model, "--data", shapes_corpus, code=2)
    assert "--all" in printed


# Matching


@pytest.fixture
def stage2(tmp_path):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "square",
        "all",
        "of",
        "it",
        *COLOURS,
    ]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    document = {
        "model": {
            "kind": "internvideo2_stage2",
            "vision": {
                "image_size": 28, "num_frames": 2, "width": 16, "layers": 1, "heads": 2,
                "mlp_width": 32, "pool_heads": 2, "embed_dim": 12,
            },
            "text": {
                "vocab_size": len(words), "mask_id": 4, "width": 16, "layers": 2,
                "fusion_layer": 1, "heads": 2, "mlp_width": 32, "max_positions": 16,
            },
            "tokenizer": str(tmp_path / "bert"),
            "context_length": 8,
            "embed_dim": 8,
        },
        "data": {"held_out": 0.1, "batch_size": 4},
        "optim": {"lr": 1.0, "steps": 1},
        "run": {"seed": 0},
    }  # fmt: skip
    model = config_from_dict(document, "a test").model
    assert isinstance(model, InternVideo2Stage2Config)
    torch.manual_seed(0)
    network = InternVideo2Stage2(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # so that pairs differ
    export_folder(network.state_dict(), model, tmp_path / "stage2")
    return tmp_path / "stage2"


def test_candidates_are_ranked_by_the_matcher(stage2, benchmark, run):
    asked = stage2, "--benchmark", "captions", "--folder", benchmark, "--batch-size", 3
    found, printed = run(*asked, "--rerank")
    assert "128 re-ranked" in printed
    loaded = load_model(stage2)
    matcher = loaded.task.matcher()
    assert matcher is not None
    frames = []
    for name in COLOURS:
        (view,) = squares(decode(Clip(name, benchmark / "videos" / f"{name}.mp4"), 2)[0], 28, 1)
        frames.append(torch.from_numpy(view).float() / 255)
    mean, std = torch.tensor(loaded.spec.pixel_mean), torch.tensor(loaded.spec.pixel_std)
    frames = ((torch.stack(frames) - mean) / std).permute(0, 1, 4, 2, 3)
    texts = [text for name in COLOURS for text in (f"a {name} square", f"{name} all of it")]
    # The benchmark's 32 tokens are more than the 16 places of this model.
    tokens = build_tokenizer(replace(loaded.spec, context_length=16))(texts)
    with torch.no_grad():
        video, text = matcher.video_tokens(frames), matcher.text_states(tokens)
        judged = torch.stack(
            [
                matcher.match(video, t.expand(4, -1, -1), k.expand(4, -1))
                for t, k in zip(text, tokens, strict=True)
            ]
        )
    assert judged.std() > 1e-4
    best = judged.argmax(dim=1) == torch.arange(4).repeat_interleave(2)
    assert found["results"]["text_to_video"]["r1"] == pytest.approx(best.float().mean().item())
    best = judged.argmax(dim=0) // 2 == torch.arange(4)
    assert found["results"]["video_to_text"]["r1"] == pytest.approx(best.float().mean().item())
    found, _ = run(*asked, "--rerank", 1)
    plain, _ = run(*asked)
    for direction in ("text_to_video", "video_to_text"):
        assert found["results"][direction]["r1"] == plain["results"][direction]["r1"]


def test_every_option_is_judged(stage2, benchmark, run):
    asked = stage2, "--benchmark", "msrvtt_mc", "--folder", benchmark
    cosine, _ = run(*asked)
    judged, _ = run(*asked, "--rerank")
    assert cosine["clips"] == judged["clips"] == 4


def test_pairs_of_a_corpus_are_judged(stage2, shapes_corpus, run):
    found, _ = run(stage2, "--data", shapes_corpus, "--all", "--rerank", 5)
    assert found["clips"] == 90
    assert found["settings"]["rerank"] == 5


# What does not go together


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--benchmark", "nothing", "--folder", "."], "known are msrvtt"),
        (["--benchmark", "msrvtt"], "--folder"),
        (["--benchmark", "msrvtt", "--folder", "."], "MSRVTT_JSFUSION_test.csv"),
        (["--benchmark", "msrvtt", "--folder", ".", "--probe", "linear"], "no classes"),
        (["--data", "x", "--views", "2"], "--views goes with --benchmark"),
        (["--data", "x", "--wise-ft", "0.5"], "--init"),
        (["--benchmark", "ucf101", "--folder", ".", "--dual-softmax"], "no retrieval"),
        (["--benchmark", "ucf101", "--folder", ".", "--augment"], "--probe"),
    ],
)
def test_mistakes_are_told(model, run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    _, printed = run(model, *arguments, code=2)
    assert said in printed
    assert "Traceback" not in printed


def test_a_model_that_does_not_match_says_so(model, benchmark, run):
    _, printed = run(model, "--benchmark", "captions", "--folder", benchmark, "--rerank", code=2)
    assert "does not judge pairs" in printed


# Every process


class Echo(Task):
    """Knows videos by their first pixel and texts by their first token; counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Identity()
        self.calls = 0

    def dual_encoder(self):
        return self

    def encode_video(self, frames_BTCHW):
        self.calls += 1
        return torch.eye(64)[(frames_BTCHW[:, 0, 0, 0, 0] * 255).round().long()]

    def encode_text(self, tokens_BL):
        return torch.eye(64)[tokens_BL[:, 0]]


def batch_of(numbers, valid=None):
    numbers = torch.tensor(numbers)
    size = len(numbers)
    frames = numbers.to(torch.uint8)[:, None, None, None, None].expand(-1, 2, 8, 8, 3).clone()
    valid = torch.ones(size, dtype=torch.bool) if valid is None else torch.tensor(valid)
    skipped = [
        (f"clip-{n}", "broken") for n, good in zip(numbers.tolist(), valid, strict=True) if not good
    ]
    tokens = numbers[:, None].expand(-1, 4).clone()
    return Batch("video", frames, None, None, tokens, valid, numbers, numbers, numbers, skipped)


def test_clips_that_could_not_be_read_do_not_count():
    task = Echo().train()
    found = evaluate(
        task, [batch_of([1, 2, 3], [True, False, True]), batch_of([4], [False])], SPEC, ALONE
    )
    assert found is not None
    assert found.text_to_video.num_queries == 2
    assert found.text_to_video.recall[1] == 1
    assert task.training


def test_without_text_or_clips_there_is_nothing_to_measure():
    assert evaluate(Task(), [batch_of([1])], SPEC, ALONE) is None
    assert evaluate(Echo(), [], SPEC, ALONE) is None
    assert evaluate(Echo(), None, SPEC, ALONE) is None
    assert evaluate(Echo(), [batch_of([1], [False])], SPEC, ALONE) is None


def test_alone_no_batch_is_repeated():
    task = Echo()
    evaluate(task, [batch_of([1]), batch_of([2])], SPEC, ALONE)
    assert task.calls == 2
    sound = batch_of([3])._replace(frames=None)
    assert [counts for _, counts in in_step([sound, batch_of([1])], SPEC, ALONE)] == [True]


def _one_of_two(rank, port, folder):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    # Three batches against one; then none against one.
    shares = ([[1, 2], [3], [4, 5]], [[6, 7]]), ([], [[8]])
    results = []
    with start() as world:
        for share in shares:
            task = Echo()
            found = evaluate(task, [batch_of(numbers) for numbers in share[rank]], SPEC, world)
            assert found is not None
            results.append(
                [task.calls, found.text_to_video.num_queries, found.text_to_video.recall[1]]
            )
    (folder / f"{rank}.json").write_text(json.dumps(results))


def test_processes_with_unequal_shares_make_equally_many_calls(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_one_of_two, (port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results == [[3, 7, 1.0], [1, 1, 1.0]]
