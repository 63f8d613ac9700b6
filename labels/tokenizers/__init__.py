"""Captions to token ids: the tokenizers, their slow path, and the compiled one with the same ids."""
