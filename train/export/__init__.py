"""Encoders in the formats of timm, transformers, open_clip and ONNX (`train export`)."""
