"""Few-step distillation of diffusion and flow models that keeps the map from noise to image.

    teacher = gadjax.load("asset:shapes_flow_teacher")
    student = gadjax.distill(teacher, DMD() + 0.3 * GAD(), prompts, steps=4)
    images = gadjax.sample(student, prompts)
    gadjax.save(student, "student")  # a diffusers folder

The terms are in gadjax.objectives. Submodules are imported lazily, on first access.
"""

import importlib

__all__ = ["Model", "distill", "load", "objectives", "sample", "save"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("gadjax")
    if name not in __all__:
        raise AttributeError(f"module 'gadjax' has no attribute {name!r}")
    if name == "objectives":
        return importlib.import_module("gadjax.objectives")
    return getattr(importlib.import_module("gadjax.api"), name)


def __dir__():
    return sorted([*globals(), *__all__, "__version__"])
