# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from typer.testing import CliRunner

from dataengine import cli
from dataengine import prefetch as module
from dataengine.config import parse_pipeline
from dataengine.needs import Weights
from dataengine.prefetch import (
    WHISPER_FILES,
    Fetch,
    Found,
    Missing,
    fetch,
    find,
    plan_fetch,
    prefetch,
    tokenizer_files,
    wanted_files,
    weights_of,
)
from tests.llm_server import free_port
from tests.test_doctor import HUB, LIGHT, llm, pipeline_of, whisper, yaml_of

CLIENT = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # pyright: ignore
"""The HTTP client of the hub's package, whose name changes with its version."""
COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class FakeHub:
    """What the hub's client does, without a hub."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repos: dict[str, dict[str, bytes] | Exception] = {}
        self.asked: list[tuple[str, str | None, bool]] = []

    def snapshot_download(self, repo, *, revision=None, dry_run=False, allow_patterns=None):
        self.asked.append((repo, revision, dry_run))
        files = self.repos[repo]
        if isinstance(files, Exception):
            raise files
        cache = self.cache / f"models--{repo.replace('/', '--')}"
        folder = cache / "snapshots" / COMMIT
        if dry_run:
            return [
                SimpleNamespace(
                    filename=name, file_size=len(data), is_cached=(folder / name).is_file()
                )
                for name, data in files.items()
            ]
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / (revision or "main")).write_text(COMMIT)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        return str(folder)

    def here(self, repo=HUB):
        folder = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    @property
    def num_fetched(self):
        return sum(not dry_run for *_, dry_run in self.asked)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


class FileServer:
    """One file at ``/<its SHA-256>/<name>``; ``cut`` ends the first answer after so many bytes."""

    def __init__(self, name: str, data: bytes, cut: int | None = None) -> None:
        self.ranges: list[str | None] = []
        self._cut = cut
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self._head(200, len(data))

            def do_GET(self):
                asked = self.headers["Range"]
                outer.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                if start >= len(data):
                    self._head(416, 0)
                    return
                self._head(206 if asked else 200, len(data) - start)
                end, outer._cut = outer._cut, None
                self.wfile.write(data[start:end])

            def _head(self, status, length):
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()

            def log_message(self, format, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        sha256 = hashlib.sha256(data).hexdigest()
        self.url = f"http://127.0.0.1:{self._http.server_port}/{sha256}/{name}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def model_files(**more):
    return {"config.json": b"{}", "tokenizer.json": b"t" * 10, "model.safetensors": b"w" * 2000} | {
        name.replace("__", "."): data for name, data in more.items()
    }


def lines_of(pipeline, *, dry_run=False):
    """Returns whether all is good, and what was said."""
    said = io.StringIO()
    good = prefetch(pipeline, Console(file=said, width=200), dry_run=dry_run)
    return good, said.getvalue().splitlines()


def quiet():
    return Console(file=io.StringIO())


def hub_error(cls, status=404):
    request = CLIENT.Request("GET", "https://hub.example/api")
    return cls("nothing for you", response=CLIENT.Response(status, request=request))


# ------------------------------------------------------------------------------ what is worth it

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]


@pytest.mark.parametrize(
    ("wanted", "unwanted"),
    [
        (
            ["model.safetensors"],
            [
                *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"),
                *("onnx/model.onnx", "model.fp16.safetensors", "coreml/model.mlpackage/x.json"),
                *("README.md", "LICENSE", ".gitattributes", "optimizer.pt", "scaler.pt"),
            ],
        ),
        (
            [*SHARDS, "model.safetensors.index.json"],
            [
                *("consolidated.safetensors", "pytorch_model-00001-of-00001.bin"),
                *("pytorch_model.bin.index.json", "original/consolidated.00.pth"),
            ],
        ),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
            ["training_args.bin", "model-Q4.gguf"],
        ),
        (["model.bin", "vocabulary.json"], ["assets/plot.png"]),  # CTranslate2
        (["InternVideo2-stage2_1b-224p-f4.pt"], []),
        (["chat_template.jinja", "preprocessor_config.json", "diffusion.safetensors"], []),
        (["1_Pooling/config.json", "model.safetensors"], ["openvino/openvino_model.bin"]),
        (["unet/model.safetensors", "vae/model.safetensors"], ["unet/model.fp16.safetensors"]),
    ],
)
def test_of_one_model_in_many_formats_what_is_loaded_is_fetched(wanted, unwanted):
    wanted = [*SMALL, *wanted]
    assert set(wanted_files([*unwanted, *wanted])) == set(wanted)
    assert set(wanted_files([*wanted, *unwanted])) == set(wanted)


def test_what_stages_share_is_fetched_once_in_the_order_of_the_stages():
    translate = {"model": {"kind": "llm", "llm": {"kind": "transformers", "model": HUB}}}
    pipeline = pipeline_of(**whisper("tiny"), **llm(), translate=translate)
    weights = weights_of(pipeline)
    assert weights[:2] == [Weights("whisper", "tiny"), Weights("hub", HUB)]
    assert weights.count(Weights("hub", HUB)) == 1


# --------------------------------------------------------------------------------------- the hub


def test_weights_come_from_the_hub_without_what_is_not_read(hub):
    hub.repos[HUB] = model_files(pytorch_model__bin=b"w" * 2000, README__md=b"# R")
    good, lines = lines_of(pipeline_of(**llm()))
    assert good
    assert hub.here() == ["config.json", "model.safetensors", "tokenizer.json"]
    assert lines[-2] == f"fetching  hub {HUB}: 2.0 kB"
    assert lines[-1].startswith(f"fetched   hub {HUB}: 2.0 kB in ")


def test_a_name_that_reads_like_a_pattern_brings_itself_alone(hub):
    hub.repos[HUB] = model_files() | {"voc[ab].txt": b"1", "voca.txt.md": b"2"}
    hub.repos[HUB]["README.md"] = b"3"
    assert lines_of(pipeline_of(**llm()))[0]
    assert "voc[ab].txt" in hub.here()
    assert not [name for name in hub.here() if name.endswith(".md")]


def test_what_is_here_is_not_fetched_again(hub):
    hub.repos[HUB] = model_files()
    pipeline = pipeline_of(**llm())
    lines_of(pipeline)
    assert hub.num_fetched == 1
    good, lines = lines_of(pipeline)
    assert good
    assert hub.num_fetched == 1
    assert lines[-1].startswith(f"there     hub {HUB}: 2.0 kB in ")


def test_what_is_still_lacking_of_a_model_comes(hub):
    hub.repos[HUB] = model_files()
    lines_of(pipeline_of(**llm()))
    hub.repos[HUB] = model_files(new_config__json=b"n" * 5000)
    _, lines = lines_of(pipeline_of(**llm()))
    assert f"fetching  hub {HUB}: 5.0 kB" in lines
    assert "new_config.json" in hub.here()


def test_the_revision_is_what_is_asked_for_and_found(hub):
    hub.repos[HUB] = model_files()
    assert lines_of(pipeline_of(**llm(revision="v2")))[0]
    assert {revision for _, revision, _ in hub.asked} == {"v2"}
    assert isinstance(find(Weights("hub", HUB, "v2")), Found)
    assert isinstance(find(Weights("hub", HUB)), Missing)


BERT = {
    "config.json": b"{}",
    "tokenizer.json": b"t" * 10,
    "tokenizer_config.json": b"{}",
    "vocab.txt": b"v" * 20,
}


def test_of_a_tokenizer_no_weights_are_fetched_and_none_are_missed(hub):
    weights = Weights("tokenizer", HUB)
    hub.repos[HUB] = BERT | {
        "model.safetensors": b"w" * 2000,
        "coreml/vocab.txt": b"v",
        "README.md": b"# R",
    }
    assert find(weights) == Missing("not in the Hugging Face cache")
    plan = plan_fetch(weights)
    assert isinstance(plan, Fetch)
    assert plan.num_bytes == 34
    done = fetch(plan, quiet())
    assert isinstance(done, Found)
    assert done.num_bytes == 34
    assert hub.here() == sorted(BERT)
    assert plan_fetch(weights) == find(weights) == done
    assert isinstance(find(Weights("hub", HUB)), Missing)  # as a model it is not whole


def test_what_has_no_vocabulary_is_no_tokenizer(hub, tmp_path):
    hub.repos[HUB] = {"config.json": b"{}", "model.safetensors": b"w", "merges.txt": b"m"}
    assert plan_fetch(Weights("tokenizer", HUB)) == Missing(
        "there is no tokenizer in it", "name another model"
    )
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w")
    answer = plan_fetch(Weights("tokenizer", str(folder)))
    assert isinstance(answer, Missing)
    assert answer.why == f"no tokenizer in {folder}"
    (folder / "spiece.model").write_bytes(b"123")
    assert plan_fetch(Weights("tokenizer", str(folder))) == Found(folder, 3)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["vocab.json", "merges.txt", "model.bin"], ["vocab.json", "merges.txt"]),
        (["vocab.json", "model.bin"], []),
        (["tokenizer.json", "chat_template.jinja"], ["tokenizer.json", "chat_template.jinja"]),
        (["sub/tokenizer.json"], []),
    ],
)
def test_a_tokenizer_is_its_vocabulary_and_what_is_read_beside_it(names, wanted):
    assert tokenizer_files(names) == wanted


def test_models_that_take_a_tokenizer_alone_say_so():
    from dataengine.models.frame_captioner import Tag2TextConfig
    from dataengine.models.internvideo2 import InternVideo2ScorerConfig

    assert Weights("tokenizer", "bert-base-uncased") in Tag2TextConfig(weights="t.pth").needs()
    needs = InternVideo2ScorerConfig(weights="i.pt").needs()
    assert Weights("tokenizer", "google-bert/bert-large-uncased") in needs


def test_without_network_weights_that_are_here_are_good(hub):
    hub.repos[HUB] = model_files()
    lines_of(pipeline_of(**llm()))
    hub.repos[HUB] = errors.OfflineModeIsEnabled("offline")
    assert lines_of(pipeline_of(**llm()))[0]


def test_a_local_folder_is_asked_of_nobody(hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    good, lines = lines_of(pipeline_of(**llm(model=str(folder))))
    assert good
    assert lines[-1] == f"there     hub {folder}: 1.0 kB in {folder}"
    good, lines = lines_of(pipeline_of(**llm(model=str(tmp_path / "gone"))))
    assert not good
    assert "no such folder" in lines[-1]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_error(errors.RepositoryNotFoundError), "no such model on the hub"),
        (hub_error(errors.GatedRepoError, 403), "terms accepted"),
        (hub_error(errors.RevisionNotFoundError), "no such revision"),
        (hub_error(errors.HfHubHTTPError, 500), "the hub answers"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (CLIENT.ConnectError("no route"), "cannot be reached (no route)"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    ],
)
def test_a_failure_is_one_line_that_says_why(hub, error, said):
    hub.repos[HUB] = error
    good, lines = lines_of(pipeline_of(**llm()))
    assert not good
    assert len(lines) == 1
    assert lines[0].startswith(f"MISSING   hub {HUB}: ")
    assert said in lines[0]


def test_the_cause_of_a_failed_question_is_what_is_said(hub):
    error = errors.DryRunError("wrapped")
    error.__cause__ = hub_error(errors.GatedRepoError, 403)
    hub.repos[HUB] = error
    assert "terms accepted" in lines_of(pipeline_of(**llm()))[1][0]


def test_a_model_without_weights_is_named(hub):
    hub.repos[HUB] = {"config.json": b"{}", "model.gguf": b"w"}
    good, lines = lines_of(pipeline_of(**llm()))
    assert not good
    assert "no weights that can be loaded" in lines[-1]


def test_what_does_not_fit_the_disk_is_not_begun(hub, monkeypatch):
    hub.repos[HUB] = model_files()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    good, lines = lines_of(pipeline_of(**llm()))
    assert not good
    assert "2.0 kB to fetch, 2.0 kB free" in lines[-1]
    assert hub.num_fetched == 0


# --------------------------------------------------------------------------------------- whisper


@pytest.fixture
def whisper_url(monkeypatch):
    import whisper as package

    def whisper_url(name, url):
        monkeypatch.setitem(package._MODELS, name, url)

    return whisper_url


def test_whispers_names_and_files_are_those_of_the_package():
    import whisper as package

    files = {name: f"{file}.pt" for name, file in WHISPER_FILES.items()}
    assert files == {name: url.rsplit("/", 1)[-1] for name, url in package._MODELS.items()}


def test_a_whisper_model_comes_where_whisper_looks_for_it(tmp_path, whisper_url):
    data = b"w" * 3000
    with FileServer("tiny.pt", data) as server:
        whisper_url("tiny", server.url)
        good, lines = lines_of(pipeline_of(**whisper("tiny")))
        assert good
        assert "fetching  whisper tiny: 3.0 kB" in lines
        assert (tmp_path / "cache" / "whisper" / "tiny.pt").read_bytes() == data
        assert lines_of(pipeline_of(**whisper("tiny")))[1][-1].startswith("there     whisper tiny")
    assert server.ranges == [None]


def test_a_broken_download_leaves_no_file_and_goes_on_where_it_ended(tmp_path, whisper_url):
    data = bytes(range(256)) * 10
    target = tmp_path / "cache" / "whisper" / "tiny.pt"
    with FileServer("tiny.pt", data, cut=1000) as server:
        whisper_url("tiny", server.url)
        good, lines = lines_of(pipeline_of(**whisper("tiny")))
        assert not good
        assert "broke off" in lines[-1]
        assert not target.exists()
        plan = plan_fetch(Weights("whisper", "tiny"))
        assert isinstance(plan, Fetch)
        assert plan.num_bytes == len(data) - 1000
        assert lines_of(pipeline_of(**whisper("tiny")))[0]
    assert server.ranges == [None, "bytes=1000-"]
    assert target.read_bytes() == data


def test_a_download_that_had_all_but_its_name_is_taken(tmp_path, whisper_url):
    data = b"w" * 3000
    target = tmp_path / "cache" / "whisper" / "tiny.pt"
    target.parent.mkdir(parents=True)
    Path(f"{target}.part").write_bytes(data)
    with FileServer("tiny.pt", data) as server:
        whisper_url("tiny", server.url)
        assert lines_of(pipeline_of(**whisper("tiny")))[0]
    assert target.read_bytes() == data


def test_a_file_that_is_another_one_is_refused_and_thrown_away(tmp_path, whisper_url):
    with FileServer("tiny.pt", b"w" * 3000) as server:
        base, _, name = server.url.rsplit("/", 2)
        whisper_url("tiny", f"{base}/{'0' * 64}/{name}")
        good, lines = lines_of(pipeline_of(**whisper("tiny")))
    assert not good
    assert "not the file it should be" in lines[-1]
    assert list((tmp_path / "cache" / "whisper").iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/0/tiny.pt", "http://a b/0/tiny.pt"])
def test_a_server_that_is_not_there_is_said_in_one_line(whisper_url, url):
    whisper_url("tiny", url.format(port=free_port()))
    good, lines = lines_of(pipeline_of(**whisper("tiny")))
    assert not good
    assert len(lines) == 1


# ------------------------------------------------------------------------------------- open_clip


@pytest.fixture
def tokenizers(monkeypatch):
    """Models whose tokenizer was asked for."""
    asked: list[str] = []
    monkeypatch.setattr("open_clip.get_tokenizer", asked.append)
    return asked


def test_a_tag_of_open_clip_comes_from_its_repository_in_the_format_it_takes(hub, tokenizers):
    import open_clip

    repo = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")["hf_hub"].strip("/")
    hub.repos[repo] = {
        "open_clip_config.json": b"{}",
        "open_clip_model.safetensors": b"w" * 2000,
        "open_clip_pytorch_model.bin": b"w" * 2000,
        "model.safetensors": b"transformers' own",
    }
    weights = Weights("open_clip", "ViT-B-32", "laion2b_s34b_b79k")
    plan = plan_fetch(weights)
    assert isinstance(plan, Fetch)
    assert isinstance(fetch(plan, quiet()), Found)
    assert hub.here(repo) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert tokenizers == ["ViT-B-32"]
    assert isinstance(plan_fetch(weights), Found)


def test_a_tag_of_open_clip_with_a_url_comes_where_open_clip_looks(
    tmp_path, monkeypatch, tokenizers
):
    data = b"w" * 2000
    with FileServer("ViT-X.pt", data) as server:
        monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda *_: {"url": server.url})
        weights = Weights("open_clip", "ViT-B-32", "x")
        missing = find(weights)
        assert isinstance(missing, Missing)
        plan = plan_fetch(weights)
        assert isinstance(plan, Fetch)
        found = fetch(plan, quiet())
    assert found == Found(tmp_path / "home" / ".cache" / "clip" / "ViT-X.pt", 2000)


def test_a_tag_that_open_clip_does_not_know_is_told_with_those_it_knows():
    answer = plan_fetch(Weights("open_clip", "ViT-B-32", "nonsense"))
    assert isinstance(answer, Missing)
    assert "laion2b_s34b_b79k" in answer.hint


def test_open_clips_own_folders_and_files(tmp_path, hub):
    folder = tmp_path / "clip"
    folder.mkdir()
    local = Weights("open_clip", f"local-dir:{folder}")
    assert isinstance(find(local), Missing)
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_model.safetensors").write_bytes(b"w" * 100)
    assert plan_fetch(local) == Found(folder, 100)
    file = folder / "open_clip_model.safetensors"
    assert plan_fetch(Weights("open_clip", "ViT-B-32", str(file))) == Found(file, 100)
    assert isinstance(plan_fetch(Weights("open_clip", "")), Found)  # the one in the package
    assert hub.asked == []


# --------------------------------------------------------------------------------- all in one go


def test_each_failing_weight_has_a_line_and_the_others_come_nevertheless(hub, tmp_path):
    other = "tiny-org/other"
    hub.repos[HUB] = hub_error(errors.RepositoryNotFoundError)
    hub.repos[other] = model_files()
    pipeline = pipeline_of(
        **whisper("enormous"),
        **llm(),
        identify_language={"model": {"kind": "fasttext", "path": str(tmp_path / "lid.bin")}},
        translate={"model": {"kind": "seamless", "model": other}},
    )
    good, lines = lines_of(pipeline)
    assert not good
    missing = sorted(line.split()[2] for line in lines if line.startswith("MISSING"))
    assert missing == sorted(f"{name}:" for name in ("enormous", tmp_path / "lid.bin", HUB))
    assert any(line.startswith(f"fetched   hub {other}") for line in lines)


def test_a_dry_run_says_sizes_and_fetches_nothing(hub, tmp_path, whisper_url):
    hub.repos[HUB] = model_files()
    with FileServer("tiny.pt", b"w" * 3000) as server:
        whisper_url("tiny", server.url)
        good, lines = lines_of(pipeline_of(**whisper("tiny"), **llm()), dry_run=True)
    assert good
    assert lines == [
        "to fetch  whisper tiny: 3.0 kB",
        f"to fetch  hub {HUB}: 2.0 kB",
        "5.0 kB to fetch",
    ]
    assert hub.num_fetched == 0
    assert server.ranges == []
    assert not (tmp_path / "cache").exists()


def test_a_pipeline_without_weights_says_so():
    stages = {name: LIGHT[name] for name in ("download", "segment", "clip")}
    pipeline = parse_pipeline(json.dumps({"name": "bare", "stages": stages}), "bare.yaml")
    assert lines_of(pipeline) == (True, ["bare needs no weights beyond its packages."])


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_the_command_ends_with_0_or_1(hub, tmp_path, dry_run):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml_of(**llm()))
    hub.repos[HUB] = model_files()
    assert CliRunner().invoke(cli.app, ["prefetch", str(path), *dry_run]).exit_code == 0
    hub.repos["other"] = hub_error(errors.RepositoryNotFoundError)
    path.write_text(yaml_of(**llm(model="other")))
    assert CliRunner().invoke(cli.app, ["prefetch", str(path), *dry_run]).exit_code == 1
