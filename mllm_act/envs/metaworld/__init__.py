"""Meta-World (MuJoCo)."""
