# SPDX-License-Identifier: Apache-2.0
"""Tiny folders in the formats that benchmarks are published in, and the clips decoded from them."""

import json
import pickle
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dataengine.errors import ConfigError
from training.evaluation import benchmarks, clips
from training.evaluation.benchmarks import Folder, paragraphs
from training.evaluation.clips import (
    Clip,
    ClipFrames,
    Views,
    decode,
    middle_frames,
    read_clips,
    squares,
)


def write_video(path, num_frames=8, size=(32, 24), rate=10, codec="mpeg4", step=20):
    """A video of which frame n is grey of ``step * n``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 4
        for number in range(num_frames):
            image = Image.new("RGB", size, (step * number % 256,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def shade(image):
    return np.asarray(image).mean()


def read(reader, folder, split="test"):
    return reader(Folder(folder), split)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# Where frames are taken


def test_frames_are_those_of_the_released_code():
    # linspace(0, n, 9) cut to whole numbers; (first + last) // 2 of each interval.
    assert middle_frames(8, 8, 0, 1) == list(range(8))
    assert middle_frames(100, 8, 0, 1) == [5, 18, 30, 43, 55, 68, 80, 93]
    assert middle_frames(30, 4, 0, 1) == [3, 10, 18, 25]


def test_short_videos_repeat_their_last_frame():
    assert middle_frames(3, 5, 0, 1) == [0, 1, 2, 2, 2]


def test_segments_take_other_frames_of_the_same_intervals():
    first, second = middle_frames(80, 4, 0, 2), middle_frames(80, 4, 1, 2)
    assert first == [6, 26, 46, 66]
    assert second == [12, 32, 52, 72]


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_decoded_frames_are_those_that_were_chosen(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", num_frames=12)
    (images,) = decode(Clip("a", path), 4)
    assert [shade(image) for image in images] == pytest.approx([20, 80, 140, 200], abs=6)


def test_seeking_and_counting_find_the_same_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", num_frames=40, codec="libx264", step=6)
    timeline = clips._read_timeline(path)
    assert len(timeline.key_tick) > 5
    assert timeline.tick is not None
    monkeypatch.setattr(clips, "_pick_by_tick", lambda *_: {})
    counted = clips._pick(path, timeline, {0, 3, 4, 17, 18, 31, 39})
    monkeypatch.undo()
    sought = clips._pick_by_tick(path, timeline.tick, timeline.key_tick, set(counted))
    assert sought.keys() == counted.keys() == {0, 3, 4, 17, 18, 31, 39}
    for number, image in counted.items():
        assert np.array_equal(np.asarray(image), np.asarray(sought[number]))
        assert shade(image) == pytest.approx(6 * number, abs=6)


def test_spans_cut_out_of_a_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=12, rate=10)
    (images,) = decode(Clip("a", path, 0.4, 0.8), 4)
    assert [shade(image) for image in images] == pytest.approx([80, 100, 120, 140], abs=6)
    with pytest.raises(ValueError, match="span"):
        decode(Clip("a", path, 5.0, 6.0), 4)


def test_three_crops_lie_along_the_longer_side():
    image = Image.new("RGB", (90, 30))
    for third, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        image.paste(colour, (30 * third, 0, 30 * third + 30, 30))
    for third, view in enumerate(squares([image], 8, 3)):
        assert view.shape == (1, 8, 8, 3)
        assert view.mean(axis=(0, 1, 2)).argmax() == third
    tall = squares([image.transpose(Image.Transpose.ROTATE_270)], 8, 3)
    assert [view.mean(axis=(0, 1, 2)).argmax() for view in tall] == [0, 1, 2]
    (whole,) = squares([image], 9, 1)
    assert [whole[0, :, 1 + 3 * third].mean(axis=0).argmax() for third in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_cannot_be_read_is_named_and_left_out(tmp_path, num_workers):
    good = write_video(tmp_path / "good.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(good.read_bytes()[:400])
    named_clips = [Clip("gone", None), Clip("bad", bad), Clip("good", good), Clip("cut", cut)]
    frames = ClipFrames(named_clips, 2, 16, Views(2, 1))
    parts = list(read_clips(frames, range(4), batch_size=3, num_workers=num_workers))
    assert [part.positions.tolist() for part in parts] == [[2], []]
    assert parts[0].frames.shape == (1, 2, 2, 16, 16, 3)
    named = dict(failure for part in parts for failure in part.failures)
    assert named.keys() == {"gone", "bad", "cut"}
    assert named["gone"] == "no such file"


def test_augmented_frames_differ_by_epoch_and_are_repeatable(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    only = [Clip("a", path)]
    one, again, other = (
        ClipFrames(only, 1, 16, Views(), seed)[0][1] for seed in ((0, 1), (0, 1), (0, 2))
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# Folders


def test_videos_are_found_by_name_anywhere(tmp_path):
    write_video(tmp_path / "deep" / "er" / "video1.webm", codec="libvpx", num_frames=1)
    folder = Folder(tmp_path)
    assert folder.clip("video1").path == folder.clip("x/video1.mp4").path
    assert folder.clip("video2") == Clip("video2", None)


def test_videos_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / name / "v.avi", num_frames=1)
    folder = Folder(tmp_path)
    assert folder.clip("b/v.avi").path == tmp_path / "b" / "v.avi"
    with pytest.raises(ConfigError, match="may be"):
        folder.clip("v")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"MSRVTT_JSFUSION_test\.csv"):
        read(benchmarks.msrvtt, tmp_path)
    with pytest.raises(ConfigError, match="No folder"):
        Folder(tmp_path / "nowhere")


# Retrieval


def texts(captioned):
    return {clip.name: found for clip, found in captioned}


def test_msrvtt(tmp_path):
    write(
        tmp_path / "annotation" / "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\n"
        "ret0,msr7010,video7010,a woman creating a fondant baby\n"
        'ret1,msr7020,video7020,"a man, and a dog"\n',
    )
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo0\n")
    sentences = [
        {"caption": "one", "video_id": "video0", "sen_id": 0},
        {"caption": "two", "video_id": "video0", "sen_id": 1},
        {"caption": "other", "video_id": "video1", "sen_id": 2},
    ]
    write(tmp_path / "MSRVTT_data.json", json.dumps({"videos": [], "sentences": sentences}))
    write_video(tmp_path / "videos" / "all" / "video7010.mp4", num_frames=1)
    found = read(benchmarks.msrvtt, tmp_path)
    assert texts(found) == {
        "video7010": ("a woman creating a fondant baby",),
        "video7020": ("a man, and a dog",),
    }
    assert [clip.path is None for clip, _ in found] == [False, True]
    assert texts(read(benchmarks.msrvtt, tmp_path, "train")) == {"video0": ("one", "two")}


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_msvd(tmp_path, capsys):
    write(tmp_path / "test_list.txt", "a_1_2\nb_3_4\n")
    captions = {"a_1_2": [["a", "man"], ["someone"]], "b_3_4": [["a", "dog"]], "c": [["no"]]}
    with (tmp_path / "raw-captions.pkl").open("wb") as file:
        pickle.dump(captions, file, protocol=2)
    expected = {"a_1_2": ("a man", "someone"), "b_3_4": ("a dog",)}
    assert texts(read(benchmarks.msvd, tmp_path)) == expected
    sentences = {name: [" ".join(words) for words in some] for name, some in captions.items()}
    write(tmp_path / "raw-captions.json", json.dumps(sentences))
    assert texts(read(benchmarks.msvd, tmp_path)) == expected
    (tmp_path / "raw-captions.json").unlink()
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(ConfigError, match="pickle of plain lists"):
        read(benchmarks.msvd, tmp_path)
    assert "run" not in capsys.readouterr().out


def test_didemo_paragraphs_are_in_the_order_of_time(tmp_path):
    moments = [
        {"video": "x@N_1.avi", "description": "then that ", "times": [[3, 4], [3, 3], [4, 4]]},
        {"video": "x@N_1.avi", "description": "first this", "times": [[0, 0], [0, 1]]},
        {"video": "y.mp4", "description": "alone", "times": [[5, 5]]},
    ]
    write(tmp_path / "test_data.json", json.dumps(moments))
    write_video(tmp_path / "videos" / "x@N_1.mp4", num_frames=1)
    apart = read(benchmarks.didemo, tmp_path)
    assert apart[1].clip.start_s == 0
    assert apart[1].clip.end_s == 7.5
    assert apart[2].clip[2:] == (25.0, 30.0)
    joined = paragraphs(apart, (0.0, 30.0))
    assert texts(joined) == {"x@N_1.avi": ("first this then that",), "y.mp4": ("alone",)}
    assert joined[0].clip[2:] == (0.0, 30.0)
    assert joined[0].clip.path is not None


def test_activitynet(tmp_path):
    item = {
        "duration": 82.7,
        "timestamps": [[17.4, 60.8], [0.8, 19.9]],
        "sentences": [" Another person walks in. ", "A young woman sits."],
    }
    write(tmp_path / "val_1.json", json.dumps({"v_uqiMw7tQ1Cc": item}))
    apart = read(benchmarks.activitynet, tmp_path)
    assert apart[0].clip[2:] == (17.4, 60.8)
    (joined,) = paragraphs(apart, (0.0, None))
    assert joined.texts == ("A young woman sits. Another person walks in.",)
    assert joined.clip[2:] == (0.0, None)


def test_lsmdc(tmp_path):
    name = "1009_Spider-Man_00.03.15.150-00.03.21.255"
    columns = [
        name,
        "00.03.15.150",
        "00.03.21.255",
        "00.03.15.150",
        "00.03.21.255",
        "SOMEONE runs.",
    ]
    write(tmp_path / "LSMDC16_challenge_1000_publictect.csv", "\t".join(columns) + "\n")
    path = write_video(tmp_path / "videos" / "1009_Spider-Man" / f"{name}.avi", num_frames=1)
    (only,) = read(benchmarks.lsmdc, tmp_path)
    assert only.texts == ("SOMEONE runs.",)
    assert only.clip.path == path
    write(tmp_path / "LSMDC16_challenge_1000_publictect.csv", "two\tcolumns\n")
    with pytest.raises(ConfigError, match="six"):
        read(benchmarks.lsmdc, tmp_path)


def test_vatex(tmp_path):
    items = [
        {"videoID": f"{name}_000010_000020", "enCap": ["one", "two"], "chCap": ["x"]}
        for name in ("a", "b")
    ]
    write(tmp_path / "vatex_validation_v1.0.json", json.dumps(items))
    assert len(read(benchmarks.vatex, tmp_path)) == 2
    write(tmp_path / "test_list.txt", "b_000010_000020\n")
    assert texts(read(benchmarks.vatex, tmp_path)) == {"b_000010_000020": ("one", "two")}


def test_caption_lists_of_the_released_code(tmp_path):
    items = [
        {"video": "sub/v1.mp4", "caption": "one"},
        {"image": "v2.mp4", "caption": ["two", "three"]},
    ]
    write(tmp_path / "test.json", json.dumps(items))
    expected = {"sub/v1.mp4": ("one",), "v2.mp4": ("two", "three")}
    assert texts(read(benchmarks.caption_list, tmp_path)) == expected
    write(tmp_path / "test.json", json.dumps([{"video": "v"}]))
    with pytest.raises(ConfigError, match="no caption"):
        read(benchmarks.caption_list, tmp_path)
    write(tmp_path / "test.json", "[{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read(benchmarks.caption_list, tmp_path)


# Classification


def labels(found):
    return {clip.name: found.classes[label] for clip, label in found.clips}


def test_kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    write(tmp_path / "validate.csv", f"{header}ski jumping,abc,5,15,validate\n")
    write(tmp_path / "train.csv", f"{header}archery,def,0,10,train\nski jumping,ghi,1,11,train\n")
    path = write_video(tmp_path / "val" / "ski jumping" / "abc_000005_000015.mp4", num_frames=1)
    found = read(benchmarks.kinetics, tmp_path)
    assert found.classes == ("archery", "ski jumping")
    assert labels(found) == {"abc_000005_000015": "ski jumping"}
    assert found.clips[0].clip.path == path
    assert len(read(benchmarks.kinetics, tmp_path, "train").clips) == 2
    write(tmp_path / "validate.csv", "label,other\na,b\n")
    with pytest.raises(ConfigError, match="youtube_id"):
        read(benchmarks.kinetics, tmp_path)


def test_ssv2(tmp_path):
    write(
        tmp_path / "something-something-v2-labels.json",
        json.dumps({"Holding something": "1", "Approaching something with your camera": "0"}),
    )
    item = {
        "id": "74225",
        "label": "holding potato",
        "template": "Holding [something]",
        "placeholders": ["potato"],
    }
    write(tmp_path / "something-something-v2-validation.json", json.dumps([item]))
    path = write_video(tmp_path / "74225.webm", codec="libvpx", num_frames=1)
    found = read(benchmarks.ssv2, tmp_path)
    assert labels(found) == {"74225": "Holding something"}
    assert found.clips[0] == (Clip("74225", path), 1)
    (question,) = read(benchmarks.ssv2_mc, tmp_path)
    assert question.options[0] == "Approaching something with your camera"
    assert question.answers == {1}


def test_ucf101(tmp_path):
    write(tmp_path / "ucfTrainTestlist" / "classInd.txt", "1 ApplyEyeMakeup\n2 YoYo\n")
    name = "v_ApplyEyeMakeup_g01_c01"
    write(tmp_path / "ucfTrainTestlist" / "testlist01.txt", f"ApplyEyeMakeup/{name}.avi\n")
    write(tmp_path / "ucfTrainTestlist" / "trainlist01.txt", "YoYo/v_YoYo_g08_c01.avi 2\n")
    path = write_video(tmp_path / "UCF-101" / "ApplyEyeMakeup" / f"{name}.avi", num_frames=1)
    found = read(benchmarks.ucf101, tmp_path)
    assert found.classes == ("Apply Eye Makeup", "Yo Yo")
    assert found.clips == [(Clip(f"ApplyEyeMakeup/{name}.avi", path), 0)]
    assert [label for _, label in read(benchmarks.ucf101, tmp_path, "train").clips] == [1]


def test_videos_below_linked_folders_are_found_once(tmp_path):
    folder = tmp_path / "benchmark"
    write(tmp_path / "elsewhere" / "deep" / "a.mp4", "")
    write(tmp_path / "elsewhere" / "labels.txt", "")
    write(folder / "videos" / "b.mp4", "")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    # A second way to the same files, and two that lead back up.
    (folder / "again").symlink_to(folder / "videos")
    (folder / "videos" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    found = Folder(folder)
    assert found.clip("a").path == folder / "linked" / "deep" / "a.mp4"
    assert found.clip("videos/b.mp4").path == folder / "videos" / "b.mp4"
    assert found.file("labels.txt") == folder / "linked" / "labels.txt"


def test_hmdb51_reads_linked_splits(tmp_path):
    write(tmp_path / "elsewhere" / "wave_test_split1.txt", "c.avi 2")
    write(tmp_path / "hmdb" / "a" / "zoom_test_split1.txt", "d.avi 2")
    (tmp_path / "hmdb" / "z").symlink_to(tmp_path / "elsewhere")
    # In alphabetical order of the classes, not of the folders.
    assert read(benchmarks.hmdb51, tmp_path / "hmdb").classes == ("wave", "zoom")


def test_hmdb51(tmp_path):
    splits = tmp_path / "testTrainMulti_7030_splits"
    write(splits / "brush_hair_test_split1.txt", "a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    write(splits / "wave_test_split1.txt", "d#1.avi 2 \n")
    write(splits / "wave_test_split2.txt", "e.avi 2 \n")
    found = read(benchmarks.hmdb51, tmp_path)
    assert labels(found) == {"brush_hair/b.avi": "brush hair", "wave/d#1.avi": "wave"}
    assert labels(read(benchmarks.hmdb51, tmp_path, "train")) == {"brush_hair/a.avi": "brush hair"}


def test_label_lists_of_the_released_code(tmp_path):
    write(tmp_path / "classes.txt", "run\nwalk fast\n")
    write(tmp_path / "val.csv", "a b/one.mp4,1\ntwo.mp4 0\n")
    found = read(benchmarks.label_list, tmp_path)
    assert labels(found) == {"a b/one.mp4": "walk fast", "two.mp4": "run"}
    write(tmp_path / "val.csv", "one.mp4 2\n")
    with pytest.raises(ConfigError, match="below 2"):
        read(benchmarks.label_list, tmp_path)


# Multiple choice


def test_msrvtt_mc(tmp_path):
    item = {"image": "video1.mp4", "caption": ["a", "b", "c", "d", "e"], "answer": 3}
    write(tmp_path / "msrvtt_mc_test.json", json.dumps([item]))
    (question,) = read(benchmarks.msrvtt_mc, tmp_path)
    assert question.options[min(question.answers)] == "d"
    (tmp_path / "msrvtt_mc_test.json").unlink()
    line = {"clip_name": "video1", "options": ["a", "b"], "answer": 1}
    write(tmp_path / "msrvtt_mc_test.jsonl", json.dumps(line) + "\n")
    (question,) = read(benchmarks.msrvtt_mc, tmp_path)
    assert (question.clip.name, question.answers) == ("video1", {1})


def test_charades_mc(tmp_path):
    names = "".join(f"c{number:03d} Action {number}\n" for number in range(157))
    write(tmp_path / "Charades_v1_classes.txt", names)
    write(
        tmp_path / "Charades_v1_test.csv",
        "id,subject,script,actions,length\n"
        "YSKX3,T7C3,He runs.,c092 11.90 21.20;c147 0.00 12.60,30\nABC,X,Stands.,,20\n",
    )
    both = read(benchmarks.charades_mc, tmp_path)
    assert [question.answers for question in both] == [{92, 147}, set()]
    assert both[0].options[92] == "Action 92"
    answer = [0] * 157
    answer[5] = 1
    item = {"video": "YSKX3.mp4", "option": [f"x{i}" for i in range(157)], "answer": answer}
    write(tmp_path / "charades_mc_test.json", json.dumps([item]))
    (question,) = read(benchmarks.charades_mc, tmp_path)
    assert question.answers == {5}
    with pytest.raises(ConfigError, match="no training split"):
        read(benchmarks.charades_mc, tmp_path, "train")
