"""The pure parts of the recipes that make the bundled models, against brute force and hand computations."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import align
import audit
import build_corpus
import degrade
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
    keys = voice * len(pretrain.BUCKETS) * 10_000 + frames
    clips = pretrain.Utterances(torch.empty(0), torch.empty(0), torch.empty(0), spans, keys)
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
    # xyzzy is no word; "to day" is joined, ";" closes a sentence, "Mr." is spelled out
    expected = ["He came home today.", "Mister Hall saw him at once.", "We met Emma there."]
    assert build_corpus.sentences(prose, lexicon) == expected


def test_pairs_share_a_condition_as_often_as_asked(monkeypatch: pytest.MonkeyPatch):
    # one voice, 200 clips of 100 frames in each of two conditions: those of the same one by choice, or by chance
    monkeypatch.setattr(pretrain, "SAME_CONDITION", 0.4)
    bucket = np.repeat([0, 2], 200)
    frames = np.full(400, 100)
    spans = np.stack([np.arange(400) * 100, frames, np.zeros(400, int), np.zeros(400, int)], axis=1)
    clips = pretrain.Utterances(*[torch.empty(0)] * 3, spans, bucket * 10_000 + frames)
    pairs = pretrain.draw_pairs(clips, 20_000, 200, np.random.default_rng(0))
    same = bucket[pairs[:, 0] // 100] == bucket[pairs[:, 4] // 100]
    assert same.mean() == pytest.approx(0.4 + 0.6 / 2, abs=4 * (0.7 * 0.3 / 20_000) ** 0.5)


def test_timing_of_takes_is_that_they_were_made_with():
    # 400 sentences of 30 phonemes, two takes each, so long that whole units hide nothing
    rng = np.random.default_rng(0)
    units, clips = [], []
    for sentence in range(400):
        likely = rng.uniform(1e4, 2e4, 30)
        for _ in range(2):
            units.append(np.round(likely * np.exp(0.1 * rng.standard_normal() + 0.2 * rng.standard_normal(30))))
            clips.append(("joe", f"sentence {sentence}"))
    timing = align.fit_timing(clips, units)
    # the share of a clip that a phoneme gets has lost the clip's own mean: 29 / 30 of the variance are left
    assert timing["local_std"] == pytest.approx(0.2 * (29 / 30) ** 0.5, rel=0.03)
    # and the clip's length varies with that mean, by 0.2 / sqrt(30), besides
    assert timing["pace_std"] == pytest.approx((0.1**2 + 0.2**2 / 30) ** 0.5, rel=4 / 800**0.5)
    assert timing["local_correlation"] == pytest.approx(-1 / 29, abs=4 / (400 * 29) ** 0.5)


def test_words_of_an_aligned_sentence():
    # oh OW1, no N OW1: silence 1 unit, then 2; 3 + 4; the stop 5; a unit is 512 samples
    assert degrade.words_of("Oh no.", [1, 2, 3, 4, 5]) == [("oh", 512, 3 * 512), ("no", 3 * 512, 10 * 512)]


def speech() -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(24_000)


@pytest.mark.parametrize("seed", range(6))
def test_a_slip_changes_one_word_and_nothing_else(seed: int):
    words = [("one", 2_000, 7_000), ("two", 7_000, 13_000), ("three", 13_000, 19_000)]
    changed, label = degrade.slip(speech(), words, np.random.default_rng(seed))
    _, start, end = words[label["word"]]
    outside = np.r_[0:start, end:24_000]
    assert np.array_equal(changed[outside], speech()[outside])
    assert not np.allclose(changed[start:end], speech()[start:end])


@pytest.mark.parametrize("seed", range(8))
def test_noise_has_the_level_that_its_label_says(seed: int):
    noisy, label = degrade.noise(
        speech(), np.random.default_rng(seed), lambda: np.random.default_rng(9).normal(size=9_000)
    )
    added = noisy - speech()
    assert 10 * np.log10(np.mean(speech() ** 2) / np.mean(added**2)) == pytest.approx(label["snr_db"], abs=0.051)


def test_a_narrow_band_has_nothing_outside():
    narrow, label = degrade.band(speech(), np.random.default_rng(1), speech)
    frequency = np.fft.rfftfreq(24_000, 1 / 24_000)
    power = np.abs(np.fft.rfft(narrow)) ** 2
    outside = (frequency > label["high_hz"] * 1.1) | (frequency < label["low_hz"] * 0.9)
    assert power[outside].sum() < 1e-9 * power.sum()


def test_partial_rank_correlation_is_that_of_the_formula():
    a, b, c = np.random.default_rng(0).normal(size=(3, 40))
    b, c = b + a, c + a
    r = {
        pair: scipy.stats.spearmanr(*values).statistic
        for pair, values in {"ab": (a, b), "ac": (a, c), "bc": (b, c)}.items()
    }
    assert audit.partial_rank_correlation(a, b) == pytest.approx(r["ab"])
    partial = (r["ab"] - r["ac"] * r["bc"]) / ((1 - r["ac"] ** 2) * (1 - r["bc"] ** 2)) ** 0.5
    assert audit.partial_rank_correlation(a, b, c) == pytest.approx(partial)


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
        tokens=aligned.repeat(pretrain.TIMINGS, 1),
        guessed=torch.tensor([1, 2, 2, 2, 5, 6, 6]),
        spans=np.zeros((0, 4), dtype=np.int64),
        keys=np.zeros(0, dtype=np.int64),
    )
    pairs = torch.tensor([[0, 7, 0, 4, 7, 6, 4, 3]] * 2)
    pretrain.flow_matching_loss(Dit(), clips, pairs, 12)
    # even items see the reference as guessed, odd ones as aligned; the other six places are empty
    assert seen[-1] == ([[1, 2, 2, 2, 5, 5, *[-1] * 6], [1, 1, 2, 2, 5, 5, *[-1] * 6]], 12)
