"""One file per evaluator, named like its command `train NAME`; a new file is a new evaluator.

A file defines `EVALUATION`, an instance of a subclass of `train.evals.protocol.Evaluation` whose `name` is the file's
name and whose `section` has the evaluator's own keys. Suites find it by its name. Its command has the shared options
and the first paragraph of the file's docstring as help; options of its own are written in train/evals/commands.py.
"""
