"""Recording demonstrations and writing them as RLDS."""
