"""BabyAI demonstrations as a TFDS dataset."""
