"""Names that are not there: every loader says what is known, what is near, and where one's own is looked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_mel import policies
from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.rewards.load import load_reward
from rlhf_mel.speech.text import load_tokenizer
from rlhf_mel.vocoders import load_vocoder


@pytest.mark.parametrize(
    ("load", "name", "near"),
    [
        (load_algorithm, "flow_gpro", "flow_grpo"),
        (load_reward, "moss", "mos"),
        (load_vocoder, "bigvagn", "bigvgan"),
        (load_tokenizer, "phonem", "phoneme"),
    ],
)
def test_a_name_that_is_nearly_right_is_told_the_right_one(load: Callable[[str], Any], name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown \w+ '{name}': expected .*, did you mean {near}\b"):
        load(name)


@pytest.mark.parametrize("load", [load_algorithm, load_reward, load_vocoder, policies.load])
def test_ones_own_that_is_not_there_is_told_where_it_was_looked_for(load: Callable[[str], Any]) -> None:
    with pytest.raises(
        ValueError, match="'no_such_module:Mine': no module 'no_such_module'; put its folder on the path"
    ):
        load("no_such_module:Mine")
    with pytest.raises(ValueError, match="'json:Mine': module json has no 'Mine'; define it there"):
        load("json:Mine")
