"""The compiled parts of the tokenizers."""
