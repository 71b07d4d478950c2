"""The example on text: its data are as they say, and its script trains, converts and scores every form."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from examples.text.data import SPECIAL, Reviews
from examples.text.reviews import BAD, DISLIKE, GOOD, LIKE, write
from tests.processes import run_all

NEGATIONS = ("was not", "anything but", "nobody would", "did not")


def sides(text: str) -> set[bool]:
    """Whether each clause with an opinion says something good, by its words and its negation."""
    found = set()
    for clause in re.split(r" [.;,]", text):
        words = [word for word in clause.split() if word in (*GOOD, *BAD, *LIKE, *DISLIKE)]
        for word in words:
            negated = any(negation in clause for negation in NEGATIONS)
            found.add((word in (*GOOD, *LIKE)) != negated)
    return found


def test_answers_follow_from_the_words_and_the_negations() -> None:
    dice = random.Random(0)
    reviews = [write(dice) for _ in range(500)]
    expected = [{False}, {True}, {False, True}]
    assert [review for review in reviews if sides(review.text) != expected[review.answer]] == []
    assert {review.answer for review in reviews} == {0, 1, 2}


def test_batches_are_padded_and_masked() -> None:
    data = Reviews(200, 20, batch=8)
    assert len({*data.train, *data.val, *data.test}) == 240
    lengths = set()
    for inputs, answers in data.test_dataloader():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.shape == mask.shape
        assert len(ids) == len(answers)
        assert torch.equal(mask == 0, ids == SPECIAL.index("[PAD]"))
        assert (ids[:, 0] == SPECIAL.index("[CLS]")).all()
        lengths.add(ids.shape[1])
    assert len(lengths) > 1
    assert data.tokenizer(["never-seen"])["input_ids"].tolist() == [[1, SPECIAL.index("[UNK]"), 2]]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_script_scores_every_form(attention: str, tmp_path: Path) -> None:
    tiny = ["--reviews=2000", "--tested=200", "--epochs=6", "--qat-epochs=2", "--lr=3e-3"]
    command = ["-m", "examples.text", *tiny, f"--attention={attention}", f"--output={tmp_path}"]
    (said,) = run_all([(command, {})], tmp_path)
    assert "Warning" not in said
    assert "14 of 14 layers are int8" in said
    forms = ("float", "int8, not trained", "fake-quant", *(f"int8 in {x}" for x in RUNTIMES))
    scores = {}
    for form in forms:
        score = re.search(rf"^│ {form} +│ +([0-9.]+)", said, flags=re.MULTILINE)
        assert score, said
        scores[form] = float(score[1])
    assert scores["float"] > 50, said
    for form in forms[2:]:
        assert scores[form] > scores["float"] - 5, said


RUNTIMES = ("PyTorch", "ONNX Runtime", "OpenVINO")
