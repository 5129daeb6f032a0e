"""GGUF files: each entry is honoured, or refused by name."""
