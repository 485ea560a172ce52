# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.evaluation.classification import (
    class_features,
    classify,
    read_templates,
    score_classes,
)
from training.evaluation.multiple_choice import accuracy, mean_average_precision


def test_the_published_sentences():
    templates = read_templates()
    assert len(templates) == 16
    assert all(template.count("{}") == 1 for template in templates)
    assert templates[0] == "a photo of action {}"
    assert templates[7] == "{}"


def test_a_class_is_the_mean_of_its_sentences_and_not_normalised():
    seen = []

    def encode(sentences):
        seen.extend(sentences)
        generator = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(len(sentences), 6, generator=generator), dim=-1)

    class_KE = class_features(encode, ["run {fast}", "walk"], ["{}", "the {} man"])
    assert seen == ["run {fast}", "the run {fast} man", "walk", "the walk man"]
    sentences = encode(seen[:4])
    torch.testing.assert_close(class_KE[1], sentences[2:].mean(dim=0))
    assert class_KE.norm(dim=-1).max() < 0.999
    # The score of a class is the mean of the cosines with its sentences.
    video_E = F.normalize(torch.randn(6), dim=0)
    torch.testing.assert_close(class_KE[0] @ video_E, (sentences[:2] @ video_E).mean())


def test_top_1_and_top_5_by_hand():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]]).repeat(4, 1)
    found = score_classes(scores, torch.tensor([0, 1, 4, 5]))
    assert (found.top1, found.top5, found.mean) == (0.25, 0.75, 0.5)
    assert found.hits.tolist() == [1, 0, 0, 0]
    assert found.chance == pytest.approx(1 / 7)
    assert found.headline() == "top-1 25.0 % (chance 14.3 %, 1.7x)"


def test_a_model_that_cannot_tell_classes_scores_chance():
    found = classify(torch.ones(3, 2), torch.ones(8, 2), torch.tensor([0, 3, 7]))
    assert found.top1 == pytest.approx(1 / 8)
    assert found.top5 == pytest.approx(5 / 8)


def test_fewer_classes_than_five():
    assert score_classes(torch.eye(3), torch.tensor([1, 0, 2])).top5 == 1


def test_accuracy_of_multiple_choice():
    scores = [np.array([0.1, 0.9, 0.2]), np.array([0.5, 0.5]), np.array([3.0, 2, 1, 0, -1])]
    found = accuracy(scores, [frozenset({1}), frozenset({0}), frozenset({4})])
    assert found.hits.tolist() == [1, 0.5, 0]
    assert found.accuracy == 0.5
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 5) / 3)


def test_average_precision_by_hand():
    # Option 0 finds its two videos at places 1 and 3, option 1 its one video at place 2; no video
    # has option 2.
    scores = np.array([[0.9, 0.1, 0], [0.5, 0.9, 0], [0.4, 0.2, 0], [0.1, 0.0, 0]])
    found = mean_average_precision(
        scores, [frozenset({0}), frozenset(), frozenset({0, 1}), frozenset()]
    )
    assert found.mean_average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert (found.num_options, found.num_questions) == (2, 4)
    assert found.chance == pytest.approx((0.5 + 0.25) / 2)


def test_average_precision_of_ties_does_not_depend_on_their_order():
    answers = [frozenset({0}), frozenset(), frozenset(), frozenset({0})]
    scores = np.zeros((4, 1))
    assert mean_average_precision(scores, answers).mean_average_precision == 0.5
    assert mean_average_precision(scores, answers[::-1]).mean_average_precision == 0.5
