"""Versions, devices and attention kernels of this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from attention_masks import BACKENDS, choose, why_not
from hyperllama import __version__

NEEDED = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "tokenizers", "omegaconf")
EXTRAS = {
    "flash-attn": "flash",
    "deepspeed": "deepspeed",
    "bitsandbytes": "quant",
    "lm_eval": "lm-eval",
    "tensorboard": "tensorboard",
}


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that decide a run's numbers."""
    names = ("torch", "transformers")
    return {"hyperllama": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def describe(head_dim: int = 128) -> str:
    """Versions, devices, and each attention backend with why it does not run, for heads of `head_dim`, as text."""
    lines = [f"hyperllama    {__version__}", f"python        {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name:<13} {version(name)}" for name in NEEDED]
    lines += [f"{name:<13} {_installed(name, extra)}" for name, extra in EXTRAS.items()]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        lines.append(
            f"{device!s:<13} {properties.name}, {memory:.0f} GiB, compute capability {capability}, CUDA {torch.version.cuda}"
        )
    if not devices:
        lines.append(
            f"GPU           none ({'torch is a CPU build' if torch.version.cuda is None else 'no CUDA device is seen'})"
        )
    device = devices[0] if devices else torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        lines += ["", f"gist attention on {device} in {name}: auto is {choose(device, dtype, head_dim)}"]
        for backend in BACKENDS:
            reason = why_not(backend, device, dtype, head_dim)
            lines.append(f"  {backend:<11} {'runs' if reason is None else f'does not run: {reason}'}")
    return "\n".join(lines)


def _installed(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed (pip install 'hyperllama[{extra}]')"
