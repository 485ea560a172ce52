# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from typer.testing import CliRunner

from dataengine import cli, doctor
from dataengine.config import parse_pipeline
from dataengine.doctor import examine, is_ready
from dataengine.errors import ConfigError
from dataengine.prompts import prompt_sha256
from tests.llm_server import free_port

HUB = "tiny-org/tiny-llm"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with empty caches, room on its disks, no GPU and no cluster."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU of 10 kB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(total_memory=10_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


LIGHT = {
    **{name: {} for name in ("download", "segment", "clip")},
    **{name: {"model": {"kind": "signals"}} for name in ("caption_video", "caption_audio")},
    **{name: {} for name in ("transcribe", "identify_language", "translate", "fuse", "score")},
}
"""Stages whose models come with packages."""


def yaml_of(**stages) -> str:
    return json.dumps({"name": "test", "stages": LIGHT | stages})


def pipeline_of(**stages):
    return parse_pipeline(yaml_of(**stages), "test.yaml")


def fuse(model):
    return {"fuse": {"model": {"kind": "llm", "llm": model}}}


def llm(**settings):
    return fuse({"kind": "transformers", "model": HUB} | settings)


def server(**settings):
    return fuse({"kind": "http", "model": "served"} | settings)


def whisper(model):
    return {"transcribe": {"model": {"kind": "whisper", "model": model}}}


def found(findings, kind, stage=None):
    [finding] = [f for f in findings if f.kind == kind and stage in (None, f.stage)]
    return finding


def save_model(folder, num_bytes=1000):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * num_bytes)
    return folder


def save_snapshot(tmp_path, branch="main"):
    """The Hugging Face cache as the hub's client lays it out."""
    cache = tmp_path / "hub" / f"models--{HUB.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / branch).write_text(COMMIT)
    return save_model(cache / "snapshots" / COMMIT)


# ------------------------------------------------------------------------------------- packages


def test_a_pipeline_whose_needs_are_here_is_ready():
    findings = examine(pipeline_of())
    assert [f for f in findings if f.status != "ok"] == []
    assert is_ready(findings)
    assert {"av", "ray", "pocketsphinx", "open_clip"} <= {f.name for f in findings}


def test_a_missing_package_stands_in_the_way_of_the_run(monkeypatch):
    here = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "vllm" else here(name)
    )
    findings = examine(pipeline_of(**fuse({"kind": "vllm", "model": HUB})))
    [finding] = [f for f in findings if f.status == "missing" and f.kind == "package"]
    assert (finding.stage, finding.name) == ("fuse", "vllm")
    assert "--extra vllm" in finding.hint
    assert not is_ready(findings)


def test_a_package_is_looked_for_inside_without_being_run(tmp_path, monkeypatch):
    package = tmp_path / "explosive"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('was run')")
    (package / "inner" / "part.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    states = {
        name: doctor._package("s", doctor.Package(name)).status
        for name in ("explosive", "explosive.inner", "explosive.inner.part", "explosive.outer")
    }
    assert [*states.values()] == ["ok", "ok", "ok", "missing"]
    assert "explosive" not in sys.modules


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(doctor, "find", lambda need: 1 / 0)
    findings = examine(pipeline_of(**llm()))
    broken = found(findings, "check")
    assert (broken.stage, broken.name, broken.status) == ("fuse", HUB, "missing")
    assert "ZeroDivisionError" in broken.detail
    assert found(findings, "disk").status == "ok"


def test_a_prompt_is_known_by_its_hash_and_a_missing_one_is_named(monkeypatch):
    pipeline = pipeline_of(**llm())
    prompts = [f for f in examine(pipeline) if f.kind == "prompt"]
    assert prompts
    assert all(f.detail == prompt_sha256(f.name)[:12] for f in prompts)
    monkeypatch.setattr("dataengine.prompts._find", missing_prompt)
    missing = [f for f in examine(pipeline) if f.kind == "prompt"]
    assert {f.status for f in missing} == {"missing"}


def missing_prompt(file):
    raise ConfigError(f"Prompt file is missing: {file}")


# -------------------------------------------------------------------------------------- weights


def test_weights_in_a_local_folder_are_found_with_their_size(tmp_path):
    folder = save_model(tmp_path / "model", 1234)
    finding = found(examine(pipeline_of(**llm(model=str(folder)))), "weights", "fuse")
    assert finding.status == "ok"
    assert finding.detail == f"1.2 kB in {folder}"


def test_a_local_folder_that_is_not_there_cannot_be_fetched(tmp_path):
    finding = found(examine(pipeline_of(**llm(model=str(tmp_path / "no")))), "weights", "fuse")
    assert finding.status == "missing"
    assert "prefetch" not in finding.hint


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("model.safetensors", "no weights in"),
        ("model-2.safetensors", "such as model-2.safetensors"),
    ],
)
def test_a_local_folder_that_lacks_a_file_is_not_a_model(tmp_path, gone, why):
    folder = save_model(tmp_path / "model")
    if gone == "model-2.safetensors":
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": gone}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (folder / gone).unlink()
    finding = found(examine(pipeline_of(**llm(model=str(folder)))), "weights", "fuse")
    assert finding.status == "missing"
    assert why in finding.detail


def test_hub_weights_are_found_in_the_cache_by_branch_and_by_commit(tmp_path):
    folder = save_snapshot(tmp_path, "main")
    for revision in ("", "main", COMMIT):
        finding = found(examine(pipeline_of(**llm(revision=revision))), "weights", "fuse")
        assert (finding.status, finding.detail) == ("ok", f"1.0 kB in {folder}")
    other = found(examine(pipeline_of(**llm(revision="v2"))), "weights", "fuse")
    assert (other.status, other.hint) == ("missing", doctor.FETCH_HINT)


def test_hub_weights_that_are_not_here_are_to_be_fetched():
    finding = found(examine(pipeline_of(**llm())), "weights", "fuse")
    assert (finding.name, finding.status) == (f"hub {HUB}", "missing")
    assert finding.hint == doctor.FETCH_HINT


def test_a_whisper_model_is_looked_for_in_whispers_cache(tmp_path):
    assert (
        found(examine(pipeline_of(**whisper("tiny"))), "weights", "transcribe").status == "missing"
    )
    cache = tmp_path / "cache" / "whisper"
    cache.mkdir(parents=True)
    (cache / "tiny.pt").write_bytes(b"w" * 2000)
    finding = found(examine(pipeline_of(**whisper("tiny"))), "weights", "transcribe")
    assert (finding.status, finding.detail) == ("ok", f"2.0 kB in {cache / 'tiny.pt'}")


def test_a_whisper_file_may_lie_anywhere_but_must_be_whole(tmp_path):
    path = tmp_path / "mine.pt"
    torch.save({"weights": torch.zeros(1000)}, path)
    assert found(examine(pipeline_of(**whisper(str(path)))), "weights", "transcribe").status == "ok"
    path.write_bytes(path.read_bytes()[:1000])
    cut = found(examine(pipeline_of(**whisper(str(path)))), "weights", "transcribe")
    assert (cut.status, cut.detail) == ("missing", f"cut short: {path}")


def test_a_whisper_model_that_nobody_knows_cannot_be_fetched():
    finding = found(examine(pipeline_of(**whisper("enormous"))), "weights", "transcribe")
    assert finding.status == "missing"
    assert "large-v3" in finding.hint
    assert "prefetch" not in finding.hint


# ------------------------------------------------------------------------------------ endpoints


@contextlib.contextmanager
def serving(body: bytes, status: int = 200, key: str = ""):
    """Answers ``/v1/models``; yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wrong = key and self.headers["Authorization"] != f"Bearer {key}"
            code = 401 if wrong else status if self.path == "/v1/models" else 404
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def models(*names):
    return json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()


def endpoint(**settings):
    return found(examine(pipeline_of(**server(**settings))), "endpoint", "fuse")


def test_a_server_that_serves_the_model_is_fine():
    with serving(models("other", "served")) as url:
        for base_url in (url, f"{url}/"):
            assert endpoint(base_url=base_url).status == "ok"


def test_a_server_with_other_models_is_told_from_one_that_is_down():
    with serving(models("other")) as url:
        finding = endpoint(base_url=url)
    assert (finding.status, finding.detail) == ("missing", "serves other")
    down = endpoint(base_url=f"http://127.0.0.1:{free_port()}/v1")
    assert down.status == "missing"
    assert down.detail.startswith("no answer from")
    port = urlsplit(down.name.split()[-1]).port
    command = f"vllm serve served --port {port} --enable-request-id-headers"
    assert down.hint.endswith(command)
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 8000))
        except OSError:
            return  # somebody serves there
    usual = endpoint(base_url="http://127.0.0.1:8000/v1")
    assert usual.hint.endswith("vllm serve served --enable-request-id-headers")


def test_a_captioner_of_sound_that_is_not_there_is_to_be_trained(tmp_path):
    model = {"kind": "beats", "captioner": str(tmp_path / "mine")}
    findings = examine(pipeline_of(caption_audio={"model": model}))
    hints = {finding.hint for finding in findings if finding.kind == "weights"}
    (hint,) = hints
    assert hint.startswith("python -m training.audio_captioner training/audio_caption/wavcaps.yaml")
    assert f"--output {tmp_path}/mine" in hint


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": ["served"]}', b"\xff"])
def test_a_server_that_speaks_another_language_is_named(body):
    with serving(body) as url:
        finding = endpoint(base_url=url)
    assert finding.status == "missing"
    assert "does not answer as OpenAI's API does" in finding.detail


def test_a_server_that_does_not_speak_http_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            client, _ = listener.accept()
            with client:
                client.sendall(b"SSH-2.0-OpenSSH_9\r\n\r\n")
                client.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        finding = endpoint(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    assert finding.status == "missing"
    assert "SSH" in finding.detail


@pytest.mark.parametrize("url", ["http://localhost:port/v1", "http://a b/v1"])
def test_an_address_that_is_none_is_a_finding(url):
    finding = endpoint(base_url=url)
    assert (finding.status, finding.hint) == ("missing", "correct base_url")


def test_a_wrong_base_url_gets_advice():
    with serving(models("served")) as url:
        finding = endpoint(base_url=url.removesuffix("/v1"))
    assert "answers 404" in finding.detail
    assert finding.hint == "base_url ends in /v1"


def test_a_key_is_asked_for_sent_and_checked(monkeypatch):
    with serving(models("served"), key="right") as url:
        settings = {"base_url": url, "api_key_env": "TEST_DOCTOR_KEY"}
        monkeypatch.delenv("TEST_DOCTOR_KEY", raising=False)
        assert endpoint(**settings).hint == "export TEST_DOCTOR_KEY=..."
        monkeypatch.setenv("TEST_DOCTOR_KEY", "wrong")
        wrong = endpoint(**settings)
        assert "answers 401" in wrong.detail
        assert wrong.hint == "check the key in TEST_DOCTOR_KEY"
        monkeypatch.setenv("TEST_DOCTOR_KEY", "right")
        right = endpoint(**settings)
        assert right.status == "ok"
    assert "right" not in right.detail


# --------------------------------------------------------------------------------- GPUs and disks


def with_gpu(settings, share=1.0):
    settings["fuse"]["resources"] = {"num_gpus": share}
    return pipeline_of(**settings)


def test_a_gpu_that_is_not_here_is_missing():
    findings = examine(with_gpu(llm()))
    finding = found(findings, "gpu")
    assert (finding.status, finding.detail) == ("missing", "1 asked, 0 here")
    assert "num_gpus" in finding.hint
    assert not is_ready(findings)


def test_without_stages_that_ask_for_gpus_none_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("was asked"))
    assert "gpu" not in {f.kind for f in examine(pipeline_of(**llm()))}


@pytest.mark.parametrize(
    ("num_bytes", "share", "status"),
    [(7000, 1.0, "ok"), (8000, 1.0, "missing"), (7000, 0.5, "missing")],
)
def test_weights_must_fit_their_share_of_the_gpu(tmp_path, gpu, num_bytes, share, status):
    folder = save_model(tmp_path / "model", num_bytes)
    finding = found(examine(with_gpu(llm(model=str(folder)), share)), "gpu memory")
    assert (finding.stage, finding.status) == ("fuse", status)


def test_weights_that_are_not_here_have_no_size_yet(gpu):
    findings = examine(with_gpu(llm()))
    assert found(findings, "gpu").status == "ok"
    assert found(findings, "gpu memory").status == "unknown"


def test_a_full_disk_and_one_that_cannot_be_written_are_told_apart(tmp_path, monkeypatch):
    corpus = tmp_path / "deep" / "corpus"
    usage = {tmp_path: SimpleNamespace(free=10**9)}
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: usage.get(path, SimpleNamespace(free=10**12))
    )

    def disk():
        findings = examine(pipeline_of(), corpus=str(corpus))
        return next(f for f in findings if f.kind == "disk" and f.name == "corpus")

    full = disk()
    assert (full.status, full.detail) == ("missing", f"1.0 GB free at {tmp_path}")
    assert full.hint.startswith("make room")
    usage.clear()
    assert disk().status == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, _: path != tmp_path)
    assert disk().hint == "name a folder that can be written to"


# --------------------------------------------------------------------------------- command line


@pytest.fixture
def pipeline_file(tmp_path):
    def pipeline_file(**stages):
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml_of(**stages))
        return path

    return pipeline_file


def run(path, *more):
    return CliRunner().invoke(cli.app, ["doctor", str(path), *more])


def test_the_command_ends_with_0_when_all_is_here(pipeline_file):
    result = run(pipeline_file())
    assert (result.exit_code, result.exception) == (0, None)
    assert "Nothing is missing." in result.stdout


def test_the_command_ends_with_1_and_says_what_to_type_once(pipeline_file):
    path = pipeline_file(**llm(), **whisper("tiny"))
    result = run(path)
    assert result.exit_code == 1
    assert "2 missing" in result.stdout
    assert result.stdout.count(f"dataengine prefetch {path}") == 1


def test_json_says_the_same_for_programs(pipeline_file):
    result = run(pipeline_file(**llm()), "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ready"] is False
    [missing] = [f for f in answer["findings"] if f["status"] == "missing"]
    assert (missing["stage"], missing["kind"], missing["name"]) == ("fuse", "weights", f"hub {HUB}")
    ready = json.loads(run(pipeline_file(), "--json").stdout)
    assert ready["ready"] is True


def test_set_changes_what_is_looked_for(pipeline_file, tmp_path):
    folder = save_model(tmp_path / "model")
    assert (
        run(pipeline_file(**llm()), "--set", f"stages.fuse.model.llm.model={folder}").exit_code == 0
    )


def test_a_pipeline_that_is_none_ends_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dataengine", "doctor", str(tmp_path / "no.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "prefetch", "plan"])
def test_help_says_what_the_exit_status_means(command):
    said = CliRunner().invoke(cli.app, [command, "--help"]).output
    assert "Exit status: 0" in " ".join(said.split())
