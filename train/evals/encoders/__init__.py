"""Frozen encoders by name, whatever library they come from: normalised images in, features out.

encoder.py   what every encoder is;  readout.py: which block's tokens, pooled how
runs.py, timm_models.py, open_clip_models.py, hf_models.py   one kind each, with local weights
load.py      the name -> the encoder
"""
