"""Names that commands, configuration and code choose from; nothing here takes time to import."""

from typing import Literal

Formula = Literal["smooth", "paper", "none"]
"""Of the IDF, see labels/idf.py."""

TokenizerKind = Literal["bpe", "wordpiece", "unigram", "wordlevel", "catlip"]
"""What `preprocess train-tokenizer` can train."""
