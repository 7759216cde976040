"""Measuring: paired rounds, medians, peak memory. Shared by all benchmarks."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hyperllama.files import write_atomically


def paired(steps: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every step in each round; a round runs each step once, so that a drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            _synchronise()
            start = time.perf_counter()
            step()
            _synchronise()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times faster `fast` was."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_bytes(step: Callable[[], None]) -> int:
    """Memory that a step takes at its peak above what was held before it: CUDA's allocator, or resident memory on Linux."""
    if torch.cuda.is_available():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        _synchronise()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def refuse_lack_of_memory(spare: int = 2**30) -> None:
    """On Linux, from here on: who asks for more memory than there is now, but for `spare` bytes, gets an error.

    Without it the kernel would end a process, and perhaps another one.
    """
    if Path("/proc/meminfo").is_file():
        free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        most = _status("VmData") + int(free.split()[1]) * 1024 - spare
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def allocated_bytes(step: Callable[[], None]) -> int:
    """The most that PyTorch's allocator has given out at one time while a step runs, above what was held before it.

    On a CPU the resident memory of `peak_bytes` is larger: the allocator's pieces, and what kernels take for themselves.
    """
    if torch.cuda.is_available():
        return peak_bytes(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def matmul_rate(device: torch.device | str, dtype: torch.dtype, rounds: int = 9) -> float:
    """FLOP/s that the device reaches in large square products: the rate to hold a step against, where a data sheet flatters.

    The median of rounds. On a GPU a round is 20 products of 8,192 rows, some 30 ms on an H200: long enough for its clocks to
    settle under the load. On a CPU it is one of 1,024 rows.
    """
    device = torch.device(device)
    size, products = (8192, 20) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)

    def multiply():
        for _ in range(products):
            torch.mm(a, b, out=out)

    seconds = statistics.median(paired({"product": multiply}, rounds, warmup=2)["product"])
    return products * 2 * size**3 / seconds


def machine() -> dict:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(), "gpu": gpu}


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=rounds, help="paired rounds that count")
    options.add_argument("--json", type=Path, help="write the figures here too")
    return options


def write_json(path: Path | None, figures: dict) -> None:
    """Write figures with the machine they were taken on, if a path is given."""
    if path is not None:
        write_atomically(path, json.dumps({**figures, "machine": machine()}, indent=2) + "\n")


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
