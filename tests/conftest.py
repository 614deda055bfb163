"""Options and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads it as it is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch; results may not depend on them")
    parser.addoption(
        "--typecheck",
        action="store_true",
        help="check arguments and results of every annotated function as it is called (jaxtyping, beartype)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    # As early as possible: a module that is imported before the hook is not checked.
    if config.getoption("--typecheck"):
        from jaxtyping import install_import_hook

        # Not config.py: a TrainingArguments is given, by its own parser, what its annotations do not allow.
        # Nor kernels.py: Triton reads the source of what is decorated.
        root = Path(__file__).parents[1]
        files = [file.relative_to(root).with_suffix("") for file in (root / "rlhf_mel").rglob("*.py")]
        modules = [".".join(file.parts) for file in files if file.stem not in ("__init__", "config", "kernels")]
        install_import_hook([*modules, "reward_models"], "conftest.checked")
    from rlhf_mel.speech.measures import load_librosa

    load_librosa()  # before any test imports it


def checked(function: Any) -> Any:
    """`function` with its annotations checked; as it is where they cannot be (protocols, names of TYPE_CHECKING)."""
    from beartype import BeartypeConf, BeartypeStrategy, beartype
    from beartype.roar import BeartypeDecorHintException

    try:
        return beartype(conf=BeartypeConf(strategy=BeartypeStrategy.O1, is_pep484_tower=True))(function)
    except BeartypeDecorHintException:
        return function
