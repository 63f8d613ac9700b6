"""What a frozen encoder is worth for captions: ClipCap's mapper and decoder over the one loop, beam search, CIDEr-D.

ptb.py, cider.py       captions -> tokens -> CIDEr-D, without Java
decoder.py, mapper.py  the language model; features -> its prefix
captioner.py           both, with loss and beam search;  batches.py: what the loop is fed
training.py            one mapper, trained over train/loop.py;  the protocol: train/evals/kinds/caption.py
"""
