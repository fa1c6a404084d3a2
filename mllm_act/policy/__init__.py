"""A network as a policy: observation and instruction in, action out."""

from mllm_act.policy.policy import Policy

__all__ = ["Policy"]
