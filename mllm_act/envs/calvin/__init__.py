"""CALVIN: the real simulator, from the user's own checkout and in its own process."""
