# SPDX-License-Identifier: Apache-2.0
"""Video captions on pictures drawn here, so that the truth is known."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from dataengine.errors import DependencyError
from dataengine.models.camera import follow_camera
from dataengine.models.captioner import (
    ClipFrames,
    SignalsVideoConfig,
    VideoCaptions,
    build_captioner,
)
from dataengine.models.colours import NAMES, name_pixels
from dataengine.models.patches import mask_shape
from dataengine.models.signals_video import (
    agreeing_faces,
    count_faces,
    haar_faces,
    measure_clip,
    picture_box,
)
from dataengine.models.texture import name_texture
from dataengine.models.video_words import describe_clip, join_words, place_words, with_article

DARK_GREEN, RED, BLUE = (20, 70, 30), (220, 30, 30), (38, 76, 212)
WIDTH, HEIGHT = 320, 240


def plain(colour=DARK_GREEN):
    return np.full((HEIGHT, WIDTH, 3), colour, np.uint8)


def grain(seed=0, width=WIDTH, height=HEIGHT):
    """A picture with detail everywhere: blurred noise in grey."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8)
    soft = cv2.GaussianBlur(noise, (0, 0), 3).astype(np.float32)
    soft = np.clip((soft - soft.mean()) * 4 + 128, 0, 255).astype(np.uint8)
    return np.repeat(soft[..., None], 3, axis=2)


def with_disc(x, y, radius=28.0, colour=RED, ground=None):
    frame = plain() if ground is None else ground.copy()
    cv2.circle(frame, (round(x), round(y)), round(radius), colour, -1, cv2.LINE_AA)
    return frame


def caption(frames):
    return describe_clip(measure_clip(frames))


STEPS = np.linspace(0, 1, 8)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((128, 128, 128), "grey"),
        ((255, 255, 255), "white"),
        ((200, 20, 20), "red"),
        ((250, 140, 20), "orange"),
        ((110, 65, 30), "brown"),
        ((250, 225, 40), "yellow"),
        ((30, 150, 50), "green"),
        ((40, 200, 210), "cyan"),
        ((30, 60, 200), "blue"),
        ((120, 40, 160), "purple"),
        ((250, 150, 190), "pink"),
        ((135, 206, 235), "blue"),  # a sky
        ((60, 45, 35), "brown"),  # wood in the shade
    ],
)
def test_colour_has_the_name_people_give_it(rgb, name):
    assert NAMES[int(name_pixels(np.array(rgb, np.uint8)))] == name


def test_disc_that_moves_right_on_dark_green():
    frames = [with_disc(60 + 200 * step, 120) for step in STEPS]
    assert (
        caption(frames) == "A red circle moves to the right against a dark plain green background."
    )


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ((-0.5, 0), "moves to the left"),
        ((0, -0.5), "moves up"),
        ((0, 0.5), "moves down"),
        ((0.4, 0.4), "moves down and to the right"),
        ((0, 0), "in the centre"),
    ],
)
def test_direction_of_travel(way, words):
    frames = [
        with_disc(WIDTH * (0.5 + way[0] * (step - 0.5)), HEIGHT * (0.5 + way[1] * (step - 0.5)))
        for step in STEPS
    ]
    assert f"red circle {words} against" in caption(frames)


def test_disc_that_grows_and_disc_that_shrinks():
    radii = 14 + 30 * STEPS
    assert "red circle grows" in caption([with_disc(160, 120, r) for r in radii])
    assert "red circle shrinks" in caption([with_disc(160, 120, r) for r in radii[::-1]])


def test_disc_that_bounces_and_disc_that_blinks():
    bouncing = [with_disc(160, 190 - 120 * abs(np.sin(9 * step))) for step in STEPS]
    assert "red circle moves up and down" in caption(bouncing)
    blinking = [plain() if index in (2, 4, 5) else with_disc(160, 120) for index in range(8)]
    assert "red circle blinks" in caption(blinking)


def test_two_objects_are_both_told():
    frames = [with_disc(60 + 200 * s, 70, ground=with_disc(90, 190, 40, BLUE)) for s in STEPS]
    text = caption(frames)
    assert "red circle moves to the right" in text
    assert "blue circle at the lower left" in text


def test_gradual_change_of_light():
    frames = [np.full((HEIGHT, WIDTH, 3), round(40 + 150 * step), np.uint8) for step in STEPS]
    assert "it gets brighter" in caption(frames)
    assert "it gets darker" in caption(frames[::-1])
    assert "the light flickers" in caption([frames[i % 2 * 3] for i in range(8)])


def test_nothing_is_said_to_move_in_a_still_picture():
    assert caption([grain()] * 8).endswith("; nothing moves; the camera is still.")


@pytest.mark.parametrize(
    ("shift", "words"), [((10, 0), "pans right"), ((-10, 0), "pans left"), ((0, 8), "tilts down")]
)
def test_camera_that_moves_over_a_detailed_ground(shift, words):
    wide = grain(width=500, height=400)
    frames = []
    for index in range(8):
        x, y = 90 + shift[0] * index, 80 + shift[1] * index
        frames.append(wide[y : y + HEIGHT, x : x + WIDTH])
    assert caption(frames).endswith(f"the camera {words}.")


def test_camera_that_zooms():
    wide = grain()
    frames = []
    for step in STEPS:
        matrix = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), 0, 1 + 0.4 * step)
        frames.append(cv2.warpAffine(wide, matrix, (WIDTH, HEIGHT)))
    assert caption(frames).endswith("the camera zooms in.")
    assert caption(frames[::-1]).endswith("the camera zooms out.")


def test_object_that_moves_is_not_taken_for_a_camera():
    """On a plain ground only the object has features; on a detailed one, they are the fewer."""
    plain_ground = [with_disc(60 + 200 * s, 120) for s in STEPS]
    assert "camera" not in caption(plain_ground)
    textured = []
    for index in range(8):
        frame = plain((128, 128, 128))
        frame[70:170, 60 + 12 * index : 160 + 12 * index] = grain(width=100, height=100)
        textured.append(frame)
    assert "camera" not in caption(textured)
    detailed = [with_disc(60 + 200 * s, 120, 40, ground=grain()) for s in STEPS]
    assert caption(detailed).endswith("the camera is still.")


def test_unrelated_pictures_have_no_camera():
    grays = [grain(seed)[..., 0] for seed in range(4)]
    assert follow_camera(grays)[0] is None


DIAMOND = np.array([[40, 5], [65, 40], [40, 75], [15, 40]])


def mask(draw):
    picture = np.zeros((80, 80), np.uint8)
    draw(picture)
    return picture


def regular(corners, radius=30.0, inner=None):
    angles = np.arange(corners * (2 if inner else 1)) * 2 * np.pi / corners / (2 if inner else 1)
    radii = np.where(np.arange(len(angles)) % 2 == 1, inner or radius, radius)
    points = 40 + np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)
    return mask(lambda picture: cv2.fillPoly(picture, [points.round().astype(np.int32)], 1))


@pytest.mark.parametrize(
    ("picture", "shape"),
    [
        (mask(lambda m: cv2.circle(m, (40, 40), 25, 1, -1)), "circle"),
        (mask(lambda m: cv2.circle(m, (40, 40), 22, 1, 9)), "ring"),
        (mask(lambda m: cv2.rectangle(m, (20, 20), (60, 60), 1, -1)), "square"),
        (mask(lambda m: cv2.rectangle(m, (10, 30), (70, 55), 1, -1)), "rectangle"),
        (regular(3), "triangle"),
        (regular(4), "square"),  # on its corner
        (mask(lambda m: cv2.fillConvexPoly(m, DIAMOND, 1)), "diamond"),
        (regular(6), "hexagon"),
        (regular(5, inner=13), "star"),
        (mask(lambda m: cv2.ellipse(m, (40, 40), (38, 12), 20, 0, 360, 1, -1)), ""),
        (mask(lambda m: cv2.circle(m, (40, 40), 4, 1, -1)), ""),  # too small to tell
    ],
)
def test_shape_of_a_mask(picture, shape):
    assert mask_shape(picture) == shape


def surface(function):
    ys, xs = np.mgrid[0:120, 0:160]
    return (50 + 20 * function(xs, ys)).astype(np.float32)


@pytest.mark.parametrize(
    ("lightness", "word"),
    [
        (surface(lambda x, y: 0 * x), "plain"),
        (surface(lambda x, y: np.sign(np.sin(y / 5))), "horizontally striped"),
        (surface(lambda x, y: np.sign(np.sin(x / 5))), "vertically striped"),
        (surface(lambda x, y: np.sign(np.sin((x - y) / 6))), "diagonally striped"),
        (surface(lambda x, y: np.sign(np.sin(x / 5) * np.sin(y / 5))), "checkered"),
        (surface(lambda x, y: np.where(np.hypot(x % 20 - 10, y % 20 - 10) < 5, 1, 0)), "dotted"),
        (surface(lambda x, y: x / 80 - 1), "gradient"),
        (surface(lambda x, y: np.random.default_rng(0).normal(0, 0.3, x.shape)), "grainy"),
        (surface(lambda x, y: np.sign(y - 60)), ""),  # a horizon is no stripe
    ],
)
def test_texture_of_a_surface(lightness, word):
    assert name_texture(lightness, np.zeros(lightness.shape, bool)) == word


@pytest.mark.parametrize("word", ["vertically striped", "checkered"])
def test_object_does_not_hide_the_texture(word):
    across = np.sign(np.sin(np.arange(120) / 5))[:, None] if word == "checkered" else 1
    lightness = surface(lambda x, y: np.sign(np.sin(x / 5)) * across)
    covered = np.zeros(lightness.shape, bool)
    covered[15:110, 20:140] = True
    lightness[covered] = 100
    lightness[60:80, 20:140] = 0
    assert name_texture(lightness, covered) == word


def test_black_bars_are_no_part_of_the_picture():
    bright = np.full((120, 160), 150, np.uint8)
    bright[:15] = bright[-15:] = 0
    assert picture_box([bright, bright]) == (slice(15, 105), slice(0, 160))
    dark = np.zeros((120, 160), np.uint8)
    dark[50:60, 70:80] = 255
    assert picture_box([dark]) == (slice(0, 120), slice(0, 160))


def test_sky_over_land():
    frame = plain((30, 150, 50))
    frame[:100] = (90, 150, 230)
    assert "blue above and green below" in caption([frame] * 8)


def test_captions_at_three_scales():
    frames = [with_disc(60 + 200 * step, 120) for step in STEPS]
    captioner = build_captioner(SignalsVideoConfig())
    (captions,) = captioner.caption([ClipFrames(frames, list(range(8)))])
    assert isinstance(captions, VideoCaptions)
    assert captions.coarse == "A red circle in the centre against a dark plain green background."
    places = ["on the left", "in the centre", "in the centre", "on the right"]
    assert [words in text for words, text in zip(places, captions.fine, strict=True)] == [True] * 4
    assert "face" not in f"{captions}"


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (90, 160)])
def test_any_size_and_a_single_frame_have_a_caption(size):
    assert caption([np.full((*size, 3), 200, np.uint8)]).endswith(".")


def test_captions_of_many_things_stay_short():
    colours = [RED, BLUE, (250, 225, 40), (250, 150, 190)]
    texts = []
    for first in range(4):
        frames = []
        for step in STEPS:
            frame = plain((16, 16, 16))
            for number in range(3):
                x, y = 50 + 85 * number + 80 * step, 60 + 60 * (first % 2) + 80 * step
                frame = with_disc(x, y, 16, colours[(first + number) % 4], frame)
            frames.append(frame)
        texts.append(caption(frames))
    assert max(len(text.split()) for text in texts) <= 30
    assert all(" and a small " in text for text in texts)


def test_missing_face_detector_is_an_error_with_a_hint(tmp_path):
    missing = SignalsVideoConfig(face_model=str(tmp_path / "none.onnx"))
    with pytest.raises(DependencyError, match=r"none\.onnx"):
        build_captioner(missing)


def at(*boxes):
    """What a face detector gives for one frame: squares of (left, top, side)."""
    return np.array([(x, y, side, side) for x, y, side in boxes], float).reshape(-1, 4)


NONE = at()
FACE, MOVED, ELSEWHERE = (100, 50, 40), (125, 60, 44), (200, 60, 40)


@pytest.mark.parametrize(
    ("boxes", "num"),
    [
        ([at(FACE), at(MOVED), NONE, NONE], 1),
        ([at(FACE), NONE, NONE, at(MOVED)], 1),
        ([at(FACE), NONE, NONE, NONE], 0),  # seen once
        ([at(FACE), at(ELSEWHERE), NONE, NONE], 0),  # too far
        ([at(FACE), at((90, 40, 60)), NONE, NONE], 0),  # too large
        ([at(FACE, ELSEWHERE), at(MOVED, ELSEWHERE), at(FACE), NONE], 2),
        ([at(FACE, ELSEWHERE), at(MOVED), at(FACE), NONE], 1),
        ([at(FACE, (110, 55, 40)), at(MOVED), NONE], 1),  # two for one
        ([at(FACE, MOVED), NONE], 0),  # in one frame
        ([NONE, NONE], 0),
        ([at(FACE)], 0),
    ],
)
def test_face_is_one_that_two_frames_agree_on(boxes, num):
    assert agreeing_faces(boxes) == num


def test_faces_are_searched_in_four_frames_and_in_two_where_there_are_none():
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(8)]
    seen = []

    def detect(there):
        def find(frame):
            seen.append(int(frame[0, 0, 0]))
            return at(FACE) if seen[-1] in there else NONE

        return find

    assert count_faces(frames, detect({1, 5})) == 1
    assert sorted(seen) == [1, 3, 5, 7]
    seen.clear()
    assert count_faces(frames, detect({0, 1, 7})) == 0
    assert seen == [3, 5]
    assert count_faces(frames[:2], detect({0, 1})) == 1
    assert count_faces(frames[:1], detect({0})) == 0


@pytest.mark.parametrize("ground", [plain(), grain(), grain(3)])
def test_no_face_is_seen_in_shapes_and_noise(ground):
    eyes = [with_disc(x, 90, 18, (16, 16, 16), ground) for x in (110, 200)]
    detect = haar_faces()
    assert [len(detect(frame)) for frame in (ground, *eyes, with_disc(160, 120, 70))] == [0] * 4


def test_face_without_contrast_is_none(monkeypatch):
    """And its box is in the pixels of the frame, not of the small picture that is searched."""

    cascade = SimpleNamespace(
        empty=lambda: False, detectMultiScale=lambda *_, **__: np.array([[20, 30, 40, 40]])
    )
    monkeypatch.setattr(cv2, "CascadeClassifier", lambda path: cascade)
    detect = haar_faces()
    assert len(detect(plain())) == 0
    large = grain(width=426, height=320)  # twice the size of the search, each way
    assert detect(large) == pytest.approx(np.array([[40, 60, 80, 80]]), rel=0.01)


def test_captioner_names_the_faces_its_detector_finds(monkeypatch):
    captioner = build_captioner(SignalsVideoConfig())
    clip = ClipFrames([plain()] * 8, list(range(8)))
    assert "face" not in f"{captioner.caption([clip])}"
    monkeypatch.setattr(captioner, "_faces", lambda frame: at(FACE, ELSEWHERE))
    assert "; two faces are seen;" in f"{captioner.caption([clip])}"


def test_opencv_without_cascades_is_an_error_with_a_hint(monkeypatch):
    monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(DependencyError, match="Haar"):
        build_captioner(SignalsVideoConfig())


def test_words():
    assert [join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    assert (with_article("orange"), with_article("red")) == ("an orange", "a red")
    assert place_words(0.1, 0.9) == "at the lower left"
    assert place_words(0.5, 0.1) == "at the top"
