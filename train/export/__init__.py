"""Encoders in the forms that other libraries load, each checked by loading it back there.

formats.py         what a format is
timm_format.py, hf_format.py, open_clip_format.py, onnx_format.py   one each
vit_classes.py     a timm ViT as transformers' CLIPVisionModel or ViTModel
open_clip_towers.py   a trunk, its projection and a text tower as open_clip's pair
check.py           the difference between the encoder and what was written
card.py, recipe.py the model card beside it: recipe, data, results
export.py          `train export`, put together;  replace.py: which folders it may replace
llava.py           an exported tower and a language model as transformers' LLaVA
"""
