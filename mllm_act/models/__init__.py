"""The multimodal language model: vision encoder, Perceiver, Llama decoder, LoRA."""
