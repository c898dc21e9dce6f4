"""Versions, devices, and what is missing for which command."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

REQUIRED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "grain",
    "ml_collections",
    "clu",
    "numpy",
    "pillow",
    "tqdm",
)
OPTIONAL = {
    "torch": "convert --check, convert --allow-pickle, and the check of what export writes",
    "diffusers": "convert --check, and the check of what export writes",
    "tensorflow": "TensorBoard files while training",
    "tensorboard": "looking at them",
    "wandb": "log.trackers=('wandb',)",
    "trackio": "log.trackers=('trackio',)",
}
# What shows that the machine has an accelerator, and the JAX that drives it.
ACCELERATORS = {
    "gpu": (("/dev/nvidia0",), "an NVIDIA GPU", "jax[cuda13]"),
    "tpu": (("/dev/accel0", "/dev/vfio/0"), "a TPU", "jax[tpu]"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    print(f"gadjax {version('gadjax')}, Python {platform.python_version()}, {platform.platform()}")
    for name in REQUIRED:
        print(f"{name} {version(name) or 'MISSING: every command needs it'}")
    for name, use in OPTIONAL.items():
        print(f"{name} {version(name) or f'missing: only for {use}'}")
    for line in devices():
        print(line)
    return 0


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """What JAX computes on, and what it leaves unused."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # a doctor does not fall ill
        return [f"devices: none that JAX can use ({' '.join(str(error).split())})"]
    return [
        f"devices: {len(found)} x {found[0].device_kind} ({found[0].platform}), "
        f"{os.cpu_count()} CPU cores",
        *unused(found[0].platform),
    ]


def unused(platform: str) -> list[str]:
    """A line for each accelerator of this machine that a JAX on `platform` leaves alone."""
    return [
        f"found {what} that JAX does not use: pip install '{package}'"
        for kind, (paths, what, package) in ACCELERATORS.items()
        if platform != kind and any(Path(path).exists() for path in paths)
    ]
