"""Reinforcement learning by PPO (arXiv 1707.06347), with the settings of arXiv 2406.07904 and LLaRP."""
