"""Checkpoints: the steps of a run, and its frozen arrays."""
