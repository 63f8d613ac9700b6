"""One file an evaluator, by the name of its command; a new file is a new evaluator. What it holds:

    EVALUATION: protocol.Evaluation    whose `name` is the file's

Suites find it by that name, and so does `train NAME`. The command has the options that all share, and the first
paragraph of the file's docstring for its words; one with more options is written in train/evals/commands.py. Keys of
its own are a `Section` in its file, with `seeds: Seeds` among them, that `labels.config.own_section` fills from the
configuration's section `NAME`.
"""
