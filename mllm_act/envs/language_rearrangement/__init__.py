"""Language Rearrangement."""
