"""Talks to a policy server. See ``Client`` and ``ChunkClient``."""

from mllm_act_client.chunks import ChunkClient, Stale
from mllm_act_client.client import BadRequest, Client, Disconnected, SessionLost

__all__ = ["BadRequest", "ChunkClient", "Client", "Disconnected", "SessionLost", "Stale"]
