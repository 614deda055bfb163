"""Tokens and ids against hand computations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_mel.speech.text import (
    CharTokenizer,
    PhonemeTokenizer,
    duration_features,
    load_tokenizer,
    load_vocab,
    spread,
    tokens_to_ids,
)


def test_phonemes_of_a_known_word_share_its_frames():
    # CMUdict: hello HH AH0 L OW1. 17 frames are 8 units of two; without weights the six tokens are alike:
    # 8 - 6 = 2 spare ones are given where 2 k / 6 passes a half: at the second and the fifth
    assert PhonemeTokenizer()("Hello.", 17) == [" ", "HH", "HH", "AH0", "L", "OW1", "OW1", "."]


def test_a_prompt_gives_reference_and_text_their_own_frames():
    # 7 reference frames end within their fourth unit; of 14 in all, 6 are left, three units
    assert PhonemeTokenizer().prompt("oh.", "oh.", 7, 14) == [" ", "OW1", "OW1", ".", " ", "OW1", "."]
    with pytest.raises(ValueError, match="a unit for each of 3 phonemes, got 2; speak slower"):
        PhonemeTokenizer().prompt("oh.", "oh.", 7, 13)
    assert CharTokenizer().prompt("ab", "c", 7, 14) == ["a", "b", " ", "c"]  # F5-TTS's


def test_spoken_length_sums_durations():
    # 0.2 is the least, for the silence and for the stop
    assert PhonemeTokenizer({"OW1": 1.5}).spoken_length("oh") == 0.2 + 1.5 + 0.2


def test_nothing_but_punctuation_is_nothing_to_say():
    assert PhonemeTokenizer()(" ,. ") == [] == PhonemeTokenizer()("")
    assert PhonemeTokenizer().spoken_length("!") == 0.0


def test_char_tokenizer_takes_time_by_utf8_bytes():
    # F5-TTS's rule: "é" is two bytes.
    assert CharTokenizer().spoken_length("né") == 3.0


def test_braces_spell_a_word():
    assert PhonemeTokenizer.phonemes("{K AH0}") == [" ", "K", "AH0", "."]


def test_semicolons_and_dashes_pause_like_commas():
    assert PhonemeTokenizer()("oh; oh") == PhonemeTokenizer()("oh, oh") == PhonemeTokenizer()("oh -- oh")


@pytest.mark.parametrize(
    ("text", "message"),
    [("room 5", r"\['5'\].*write numbers"), ("xyzzyx", "xyzzyx.*ARPAbet"), ("{K QQ}", "ARPAbet.*QQ")],
)
def test_text_that_cannot_be_read_says_what_to_do(text, message):
    with pytest.raises(ValueError, match=message):
        PhonemeTokenizer()(text)


def test_phonemes_have_silence_before_and_a_stop_after_each_sentence():
    assert PhonemeTokenizer().phonemes("Oh. Oh") == [" ", "OW1", ".", " ", "OW1", "."]


def test_durations_are_sums_of_weights():
    # OW1 after silence and before a stop: 1.0 + 0.5 (after " ") + 0.25 (before ".") + 0.125 (a pause follows)
    weights = {"OW1": 1.0, " <": 0.5, ">.": 0.25, "OW1|pause": 0.125, ".": 0.1}
    tokenizer = PhonemeTokenizer(weights, units_per_phoneme=4.0)
    silence, vowel, stop = tokenizer.durations([" ", "OW1", "."])
    assert (silence, vowel, stop) == (0.2, 1.875, 0.2)  # 0.2 is the least
    # 0.8, 7.5 and 0.8 units are 9 together: one each, the other six to the vowel
    assert tokenizer("oh.") == [" ", *["OW1"] * 7, "."]


def test_duration_features_name_the_neighbours():
    assert duration_features(["A", "B"]) == [("A", "^<", ">B"), ("B", "A<", ">$")]


def test_duration_features_know_of_a_pause_one_and_two_phonemes_on():
    assert [names[3:] for names in duration_features(["A", "B", "C", "."])] == [(), ("B|near pause",), ("C|pause",), ()]


def test_spread_by_hand():
    assert spread([1.0, 2.0, 5.0], 8) == [1, 2, 5]
    # 7 over three alike are 2.33 each; 4 beyond one each add up to 1.33, 2.67, 4, rounded 1, 3, 4
    assert spread([1.0, 1.0, 1.0], 7) == [2, 3, 2]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.integers(0, 200))
def test_spread_gives_all_units_and_at_least_one_each(durations, spare):
    shares = spread(durations, len(durations) + spare)
    assert sum(shares) == len(durations) + spare
    assert min(shares) >= 1


def test_spread_refuses_too_little_time():
    with pytest.raises(ValueError, match="at least a unit for each of 2"):
        spread([1.0, 1.0], 1)


def test_vocab_ids_are_line_numbers_with_any_line_end(tmp_path):
    (tmp_path / "lf.txt").write_bytes(b" \na\nb")
    (tmp_path / "crlf.txt").write_bytes(b" \r\na\r\nb\r\n")
    assert load_vocab(tmp_path / "lf.txt") == load_vocab(tmp_path / "crlf.txt") == {" ": 0, "a": 1, "b": 2}


def test_ids_are_padded_with_minus_one_and_unknown_tokens_raise():
    vocab = {" ": 0, "a": 1, "b": 2}
    assert tokens_to_ids([["b", "a"], ["a"]], vocab).tolist() == [[2, 1], [1, -1]]
    assert tokens_to_ids([["z", "a"]], vocab, strict=False).tolist() == [[0, 1]]  # upstream's rule
    with pytest.raises(ValueError, match=r"got \['z'\]"):
        tokens_to_ids([["z"]], vocab)


def test_unknown_tokenizer_names_the_known():
    with pytest.raises(ValueError, match=r"char.*phoneme"):
        load_tokenizer("pinyon")
