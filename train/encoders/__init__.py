"""Frozen encoders by name: load.py, and libraries.py for timm, open_clip and transformers; their text sides: text.py."""
