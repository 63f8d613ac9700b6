"""What an encoder is worth: each protocol takes features and classes, none knows the trainer.

data/          images as people have them on disk -> places, classes, fingerprints
encoders/      frozen encoders by name: runs, timm, open_clip, Hugging Face
features.py    encoder x data -> [N, W], once for each pair; pixels.py: bytes -> pixels
protocols/     features -> scores: probe, few-shot, nearest neighbours, zero-shot
measure.py     scores -> rows and splits; run_protocol.py: one command; suite.py: all of them; tables.py
"""
