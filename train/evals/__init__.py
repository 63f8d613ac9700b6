"""Evaluation of frozen encoders: each protocol takes features and classes or captions; none knows the trainer.

data/ + train/encoders/ -> features.py: [N, W], cached -> kinds/: scores -> measure.py: rows, tables, result JSON
suite.py runs many of them; protocol.py is the interface; commands.py the command line.
"""
