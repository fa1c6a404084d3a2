"""Grounding multimodal language models in actions, in JAX (after arXiv 2406.07904)."""

__version__ = "0.2.0.dev0"
