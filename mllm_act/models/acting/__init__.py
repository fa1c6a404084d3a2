"""The model at inference: fused matrices and decode kernels. Training knows nothing of it."""
