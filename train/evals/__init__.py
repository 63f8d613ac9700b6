"""Evaluation protocols: each takes features and targets, none knows the trainer.

datasets.py   labelled images on disk: places, classes, fingerprint
encoders.py   frozen encoders by name; weights.py reads their files
features.py   encoder x data -> [N, W] arrays, once for each pair
probe.py      features -> accuracies; logistic.py is its solver
run_probe.py  `train probe`: all of it for a list of encoders, a table and the result JSON
"""
