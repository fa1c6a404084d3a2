"""Programs that run as several processes: how they start, and what they tell each other besides arrays."""
