"""Files: those of this package, written whole or not at all, downloaded from the hub with a clear error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
"""The bundled models and prompts."""


BUNDLES = ("tiny", "tiny-v0")
"""Names of bundles of policy, vocoder and recognizer: what is in ASSETS, and what was there before."""


def bundle(name: str | Path) -> Path | None:
    """The folder of the bundle called `name`; None for another name.

    Raises:
        FileNotFoundError: the former bundle is not on this machine: it is not shipped.
    """
    if str(name) not in BUNDLES:
        return None
    if str(name) == "tiny":
        return ASSETS
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_mel" / str(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name!r}: expected the former bundled models in {folder}, found none; they are not shipped: in a clone "
            "of the repository run `python recipes/former_bundle.py`"
        )
    return folder


def download(repo: str, filename: str, *, remedy: str) -> Path:
    """One file of a hub repository, from the cache where it is there.

    Raises:
        FileNotFoundError: the file is neither in the cache nor to be had; says why, and offers `remedy`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(repo, filename))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{repo}/{filename}: expected it on the Hugging Face hub or in its cache, got {type(error).__name__}:"
            f" {reason} Connect once to download it (and unset HF_HUB_OFFLINE), or use {remedy}"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file beside `path`, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all, readable by whom a new file is; metadata: text for its header."""
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))
        temporary.chmod(mode)  # safetensors lets only the owner read

    write_whole(path, write)
