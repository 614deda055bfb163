"""Options and settings that every test shares."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--typecheck",
        action="store_true",
        help="check the shapes and dtypes of annotated functions (jaxtyping and beartype)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # As early as possible: a module that is imported before the hook is not checked.
    if config.getoption("--typecheck"):
        from jaxtyping import install_import_hook

        install_import_hook(["rlhf_mel", "reward_models"], "beartype.beartype")
