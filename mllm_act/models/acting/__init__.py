"""Inference: fused matrices and decode kernels."""
