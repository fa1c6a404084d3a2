"""Stage one: learn the action tokenizer, a (residual) vector-quantized autoencoder or FAST."""
