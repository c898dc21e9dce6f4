"""Few-step distillation of diffusion and flow models that keeps what the noise meant."""

__version__ = "0.1.0"
