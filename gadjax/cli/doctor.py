"""Print versions and devices, and the packages that are missing for some commands."""

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
# Device files of an accelerator, its name, and the JAX package that drives it.
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
    """Describe the devices that JAX computes on, and accelerators that it leaves unused."""
    try:
        import jax

        available = jax.devices()
    except Exception as error:  # the report goes on without devices
        return [f"devices: none that JAX can use ({' '.join(str(error).split())})"]
    return [
        f"devices: {len(available)} x {available[0].device_kind} ({available[0].platform}), "
        f"{os.cpu_count()} CPU cores",
        *unused_accelerators(available[0].platform),
    ]


def unused_accelerators(platform: str) -> list[str]:
    """One line per accelerator of this machine that JAX on `platform` leaves unused."""
    return [
        f"found {what} that JAX does not use: pip install '{package}'"
        for kind, (paths, what, package) in ACCELERATORS.items()
        if platform != kind and any(Path(path).exists() for path in paths)
    ]
