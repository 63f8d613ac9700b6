"""Evaluation protocols: features and classes in, scores out; none knows the trainer.

protocol.py      what every protocol is;  registry.py: all of them by name;  kinds/: one file each. What some of them share or need:
lbfgs_probe.py   linear probe by logistic regression on cached features; logistic.py is its solver
mae_probe.py     linear probe by MAE's recipe: LARS, BatchNorm
finetune_*.py    the model and the batches of end-to-end fine-tuning
token_logits.py  zero-shot from the pre-training head; name_labels.py: class names -> label sets, by the build's tokenizer
"""
