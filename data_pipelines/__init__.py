"""Demonstrations: generated from simulators, stored as RLDS, read as batches."""
