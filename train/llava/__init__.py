"""The road to LLaVA's benchmarks: a projector between a frozen tower and a frozen language model, over the one loop.

records.py, prompt.py   LLaVA's json -> conversations -> token ids and what is learnt of them
batches.py              records -> batches, decoded ahead by threads
training.py             the projector, and its loss
command.py, run.py      `train llava`, put together; written for transformers and lmms-eval, and loaded back
"""
