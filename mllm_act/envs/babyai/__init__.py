"""BabyAI (minigrid)."""
