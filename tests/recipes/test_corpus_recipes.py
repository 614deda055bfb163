"""The pure parts of the recipes that make the bundled models, against brute force and hand computations."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import align
import build_corpus
import pretrain


@pytest.mark.parametrize("seed", range(5))
def test_most_probable_alignment_is_the_best_of_all(seed):
    log_probs = np.random.default_rng(seed).normal(size=(7, 3))
    every = {}
    for first, second in itertools.combinations(range(1, 7), 2):
        units = (first, second - first, 7 - second)
        every[units] = sum(log_probs[t, s] for t, s in enumerate(np.repeat(range(3), units)))
    assert tuple(align.most_probable(log_probs)) == max(every, key=every.get)


def test_duration_weights_predict_durations_that_are_sums_of_them():
    # "A" lasts 1, "B" 3 wherever they stand: relative to the mean of AB, 0.5 and 1.5
    lines, units = [["A", "B"]] * 50, [np.array([1, 3])] * 50
    weights = align.fit_durations(lines, units, ridge=1e-6)
    assert align.explained(weights, lines, units) == pytest.approx(1.0, abs=1e-5)


def test_laying_end_to_end_by_hand():
    values = torch.arange(10)
    # clip a: 2, 3; clip b: 6, 7, 8; six places, the last one empty
    laid, filled = pretrain.lay_end_to_end(
        values, torch.tensor([2]), torch.tensor([2]), torch.tensor([6]), torch.tensor([3]), 6
    )
    assert laid[0, :5].tolist() == [2, 3, 6, 7, 8]
    assert filled[0].tolist() == [True] * 5 + [False]


def test_pairs_are_of_one_voice_and_fill_the_length():
    frames = np.array([100, 150, 180, 200, 120, 150, 199, 201])
    voice = np.repeat([0, 1], 4)
    spans = np.stack([np.cumsum(frames) - frames, frames, np.zeros(8, int), np.zeros(8, int)], axis=1)
    clips = pretrain.Utterances(torch.empty(0), torch.empty(0), torch.empty(0), spans, voice * 10_000 + frames)
    pairs = pretrain.draw_pairs(clips, 64, 300, np.random.default_rng(0))
    of = dict(zip(spans[:, 0], voice, strict=True))
    total = pairs[:, 1] + pairs[:, 5]
    assert all(of[a] == of[b] for a, b in zip(pairs[:, 0], pairs[:, 4], strict=True))
    assert set(total) <= {300, 301, 302, 303}
    # voice 0: 100 + 200 and 150 + 150; voice 1: no two within 3 frames but 150 + 150
    assert {tuple(sorted(pair)) for pair in pairs[:, [1, 5]]} == {(100, 200), (150, 150)}


def test_sentences_are_whole_plain_and_known():
    prose = "He came home to day; Mr. Hall saw him at once. " * 20 + "We met Emma there. He came xyzzy home again."
    lexicon = {
        "he",
        "came",
        "home",
        "today",
        "mister",
        "hall",
        "saw",
        "him",
        "at",
        "once",
        "we",
        "met",
        "emma",
        "there",
    }
    # Emma is a name; xyzzy is no word; "to day" is joined and ";" closes a sentence
    assert build_corpus.sentences(prose, lexicon) == ["He came home today."]


def test_every_token_of_a_pair_stands_over_two_frames():
    # 7 and 6 frames are 4 and 3 units; in a batch of 12 frames the 7th token would get none of its own
    seen = []

    class Dit:
        def embed_text(self, text, frames, drop_text=False):
            seen.append((text.tolist(), frames))
            return torch.zeros(len(text), frames, 1)

        def velocity(self, x, cond, text_embedding, time):
            return torch.zeros_like(x)

    aligned = torch.tensor([1, 1, 2, 2, 5, 5, 6])
    clips = pretrain.Utterances(
        mel=torch.zeros(13, 1),
        tokens=aligned,
        guessed=torch.tensor([1, 2, 2, 2, 5, 6, 6]),
        spans=np.zeros((0, 4), dtype=np.int64),
        keys=np.zeros(0, dtype=np.int64),
    )
    pairs = torch.tensor([[0, 7, 0, 4, 7, 6, 4, 3]] * 2)
    pretrain.flow_matching_loss(Dit(), clips, pairs, 12)
    # even items see the reference as guessed, odd ones as aligned; the other six places are empty
    assert seen[-1] == ([[1, 2, 2, 2, 5, 5, *[-1] * 6], [1, 1, 2, 2, 5, 5, *[-1] * 6]], 12)
