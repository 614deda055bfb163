"""Bring back the models that were bundled as "tiny" before, under the name "tiny-v0", for one release.

Reads them from the history of this repository (a clone with all of it is needed) by what they contain, and writes them
to ~/.cache/rlhf_mel/tiny-v0 ($XDG_CACHE_HOME is heeded). Afterwards `--policy tiny-v0 --vocoder tiny-v0 --recognizer
tiny-v0` work everywhere. The policy keeps its own durations of phonemes, the most likely ones: it draws no timing.
    python recipes/former_bundle.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOBS: Mapping[str, str] = {
    "durations.json": "194164bfd8c1714d50206fa2f80d5c675df83508",
    "policy.json": "7cede1e016a09a9ab8a1c8ea9caa89a26a763548",
    "policy.safetensors": "1833d744de64df7320be31fff0dceb07f42e1f56",
    "recognizer.json": "e4068cb7bb3889d4a2b31fb7412ca34eb4db2c85",
    "recognizer.safetensors": "7ae6c32dd5b79eb76648b817a706dcee25f9b43c",
    "vocab.txt": "a8a35176f5b5b00a6feb37a9b3af97f7d099301b",
    "vocoder.json": "29938441e5906366f1781b070b3c774d62c1e85b",
    "vocoder.safetensors": "76bdf267c13dfbfa62705e9a868e93aad7a3c3b3",
}
"""Git's names of the contents of the files."""


def read_blob(name: str) -> bytes:
    """What git stores under `name`.

    Raises:
        SystemExit: it is not in this clone.
    """
    found = subprocess.run(["git", "cat-file", "blob", name], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        raise SystemExit(
            f"{name}: expected it in the history of {ROOT}, git says: {found.stderr.decode().strip()}; "
            "clone the repository with all of its history (git fetch --unshallow)"
        )
    return found.stdout


def main() -> None:
    files = {name: read_blob(blob) for name, blob in BLOBS.items()}
    config = json.loads(files["policy.json"]) | {"durations": json.loads(files.pop("durations.json"))}
    files["policy.json"] = (json.dumps(config, indent=2) + "\n").encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_mel" / "tiny-v0"
    if folder.is_dir():
        raise SystemExit(f"{folder}: is there already; remove it to write it anew")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.rename(folder)
    print(f"{folder}: {', '.join(sorted(files))}")


if __name__ == "__main__":
    main()
