"""Meta-World demonstrations as a TFDS dataset."""
