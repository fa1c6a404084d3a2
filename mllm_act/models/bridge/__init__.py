"""The bridge between vision encoder and language model, one part per file."""
