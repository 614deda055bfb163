"""Options of a reward: the fields of the `Config` beside its class, or else the keyword arguments of the class.

    class Softness:
        @dataclass(frozen=True, kw_only=True)
        class Config:
            floor_dbfs: float = -60.0
            \"\"\"Level below which a clip counts as silent.\"\"\"

        def __init__(self, config: Config | None = None) -> None: ...

A Config checks its own values in `__post_init__`. A class without one takes its options as keyword arguments, and a
plain function or an object takes none.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf_mel.lookup import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a reward, as help shows it."""

    name: str
    default: Any
    """`inspect.Parameter.empty` where it must be given."""
    meaning: str
    """The docstring of the field; empty for a keyword argument."""


def build(reward: type, options: Mapping[str, Any], *, name: str) -> Any:
    """A reward of that class, with these options; `name` is how errors call it."""
    check_options(reward, options, name=name)
    config = _config_of(reward)
    return reward(**options) if config is None else reward(config(**options))


def check_options(reward: Any, options: Mapping[str, Any], *, name: str) -> None:
    """Raise unless a reward can be built with `options`; no model is loaded.

    Raises:
        ValueError: an unknown option, a missing one, a value that the Config refuses, or options for a reward that is
            not a class.
    """
    if not inspect.isclass(reward):
        if options:
            raise ValueError(
                f"reward {name!r}: expected a class to give options to, got {type(reward).__name__}; remove "
                f"{sorted(options)}"
            )
        return
    config = _config_of(reward)
    parameters = inspect.signature(config or reward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in known and not takes_any:
            raise ValueError(
                f"reward {name!r}: expected options among {known}, got {option!r}{did_you_mean(option, known)}"
            )
    if missing := [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]:
        raise ValueError(f"reward {name!r}: expected a value of {missing}, got none; give it in reward_kwargs")
    if config is not None:
        config(**options)


def describe(reward: type) -> list[Option]:
    """The options of a reward, in the order of its Config."""
    config = _config_of(reward)
    meanings = {} if config is None else _field_docstrings(config)
    return [
        Option(name=p.name, default=p.default, meaning=meanings.get(p.name, ""))
        for p in inspect.signature(config or reward).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def _config_of(reward: type) -> type | None:
    config = getattr(reward, "Config", None)
    return config if isinstance(config, type) and dataclasses.is_dataclass(config) else None


def _field_docstrings(config: type) -> dict[str, str]:
    """The string below each field of a dataclass. Python keeps none of them, so they are read from the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
