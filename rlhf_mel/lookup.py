"""Objects by "package.module:Name", and what to say of a name that is not known."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def load_object(spec: str, what: str) -> Any:
    """The object that `spec`, "package.module:Name", names; `what` is how errors call it, "reward" for instance.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
        ImportError: the module is there, and lacks something of its own.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{what} {spec!r}: no module {error.name!r}; put its folder on the path, e.g. PYTHONPATH=."
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {spec!r}: module {module_name} has no {name!r}; define it there")
    return getattr(module, name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ", did you mean A or B?" with the known names that are nearest to `name`; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f", did you mean {' or '.join(near)}?" if near else ""
