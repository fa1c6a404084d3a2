"""Benchmarks: ``python -m mllm_act.bench NAME --help``."""
