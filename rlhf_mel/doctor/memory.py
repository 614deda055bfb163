"""The peak memory of a stretch of code, on a GPU and on a CPU."""

from __future__ import annotations

import ctypes
import sys
import threading

import psutil
import torch

MIB = 2**20


class PeakMemory:
    """`peak_bytes` taken inside over what was taken before: CUDA's own count, else the resident set every 5 ms."""

    INTERVAL_S = 0.005

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type != "cuda":
            _return_freed_memory()
        self._before = self._taken()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._ended.set()
            self._watch.join()

    def _sample(self) -> None:
        while not self._ended.wait(self.INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._taken() - self._before)

    def _taken(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        resident: int = psutil.Process().memory_info().rss
        return resident


def _return_freed_memory() -> None:
    """Let glibc give freed memory back, or the second of two equal runs seems to need none; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """What this process could still take: of the GPU, its own cache included, or of the machine's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available: int = psutil.virtual_memory().available
    return available
