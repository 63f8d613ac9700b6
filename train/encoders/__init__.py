"""Frozen encoders by name: load.py, and libraries.py for timm, open_clip, transformers; their text sides: text.py."""
