"""Writing demonstrations as RLDS."""
