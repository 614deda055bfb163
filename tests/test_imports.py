"""The floors of docs/architecture.md: imports run downward, and `reward_models` is found by name only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS: Sequence[set[str]] = (
    {"types", "masked", "modules", "storage", "metrics", "progress", "lookup"},
    {"flow", "speech"},
    {"f5", "adapters", "vocoders", "rewards", "data"},
    {"pipeline", "policies"},
    {"algorithms", "samplers", "evaluation"},
    {"training", "annotate"},
    {"doctor"},
    {"cli"},
)
"""A room imports rooms of floors below its own. A new folder or file of rlhf_mel needs a place here."""
BASE = FLOORS[0]
"""Small values and functions, which may know each other."""

MODULES = sorted((ROOT / "rlhf_mel").rglob("*.py"))
REWARDS = sorted((ROOT / "reward_models").rglob("*.py"))


def dotted(file: Path) -> list[str]:
    """rlhf_mel/f5/cfm.py as ["rlhf_mel", "f5", "cfm"], a package by its own name."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all that `file` imports anywhere, `from x import y` as x.y."""
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhf_mel" and len(parts) > 1 and floor(parts[1]) is not None else None


def floor(room: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), None)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: ".".join(dotted(file)))
def test_imports_run_downward(file: Path) -> None:
    parts = dotted(file)
    if parts == ["rlhf_mel"]:
        return  # the public names, imported on first use
    own, level = parts[1], floor(parts[1])
    assert level is not None, f"{own} has no place in the house: add it to FLOORS"
    others = {name: other for name in imported(file) if (other := room(name)) and other != own}
    above = {name for name, other in others.items() if floor(other) >= level and not {own, other} <= BASE}  # type: ignore[operator]
    assert not above, f"{'.'.join(parts)} imports from its own floor or above: {sorted(above)}"


def test_no_circles() -> None:
    """No module of the package is imported by what it imports."""
    modules = {".".join(dotted(file)): file for file in MODULES}

    def module(name: str) -> str | None:
        return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None

    uses = {own: {found for name in imported(file) if (found := module(name))} - {own} for own, file in modules.items()}
    del uses["rlhf_mel"]  # the public names again
    while free := [own for own, used in uses.items() if not used & uses.keys()]:
        for own in free:
            del uses[own]
    assert not uses, f"circles among {sorted(uses)}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: ".".join(dotted(file)))
def test_reward_models_are_found_by_name_only(file: Path) -> None:
    assert not {name for name in imported(file) if name.split(".")[0] == "reward_models"}


@pytest.mark.parametrize("file", REWARDS, ids=lambda file: ".".join(dotted(file)))
def test_a_reward_model_knows_what_lies_below_rewards_only(file: Path) -> None:
    # speech: measures, and a frozen listener that knows of mels alone, a judge as good as those that packages bring
    assert {own for name in imported(file) if (own := room(name))} <= BASE | {"rewards", "speech"}


def test_the_scan_sees_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "rlhf_mel/f5/dit.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..masked import mean\nfrom . import other\ndef f():\n    import rlhf_mel.cli\n")
    assert set(imported(file)) == {"rlhf_mel.masked.mean", "rlhf_mel.f5.other", "rlhf_mel.cli"}


def test_a_run_in_python_needs_neither_trl_nor_datasets() -> None:
    # Both are slow to import; only a command line, a YAML file and a source of `datasets` ask for them.
    code = (
        "import sys; sys.modules['trl'] = sys.modules['datasets'] = None\n"
        "from rlhf_mel import RLHFConfig, RLHFTrainer, load_prompts\n"
        "prompts = load_prompts('tiny', split='heldout').head(2)\n"
        "print(len(prompts.collate([prompts[1]])), RLHFConfig(output_dir='unused').algorithm)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.split() == ["1", "draft"]


def test_import_is_instant_and_the_public_names_exist() -> None:
    code = "import rlhf_mel, sys; assert 'torch' not in sys.modules; print(*rlhf_mel.__all__)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    import rlhf_mel

    assert {"RLHFConfig", "RLHFTrainer", "load_policy", "load_reward", "load_vocoder"} <= set(names.split())
    assert set(rlhf_mel.__all__) == rlhf_mel._MODULE_OF.keys()
    for name in rlhf_mel.__all__:
        assert getattr(rlhf_mel, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlhf_mel.nothing
