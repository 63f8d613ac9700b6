"""Two towers: the CLIP baseline (`train clip`), and a text tower for a frozen encoder (`train lit`), over the one loop.

tokens.py    rows of token ids -> what a text tower takes;  texts.py: texts -> these rows, by stage 1
model.py     trunk, projection, text tower (open_clip's) and the loss
method.py    both as methods of train/trainer.py;  command.py: `train clip`, `train lit`
"""
