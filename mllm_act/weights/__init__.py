"""Pretrained weights: import from and export to other formats, and the folder that training reads."""
