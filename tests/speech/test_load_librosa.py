"""librosa is imported by one process at a time: what Numba compiles of it in two at once kills whoever calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

PROGRAM = """
from rlhf_mel.speech import measures
measures.import_module = lambda name: print(name)
print("asks", flush=True)
measures.load_librosa()
"""


def test_a_second_process_waits_until_the_first_has_it(tmp_path: Path) -> None:
    user = os.getuid() if hasattr(os, "getuid") else 0
    with FileLock(tmp_path / f"rlhf_mel-librosa-{user}.lock"):
        second = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert second.stdout is not None and second.stdout.readline() == "asks\n"
        with pytest.raises(subprocess.TimeoutExpired):  # it imports nothing, so it would be done at once
            second.wait(timeout=2)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert said.split() == ["librosa.core", "librosa.feature", "librosa.sequence", "librosa.util", "librosa"]
