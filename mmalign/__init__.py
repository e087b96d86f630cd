"""mmalign: align text, multimodal and diffusion models with human preferences."""

__version__ = "0.1.0"
