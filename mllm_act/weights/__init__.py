"""Pretrained weights: from and to the formats of others, and the folder that training reads them from."""
