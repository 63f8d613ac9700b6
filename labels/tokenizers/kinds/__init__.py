"""One file a family of tokenizers; a new file is a new family. What it holds:

    def make(settings: Labels) -> Tokenizer | None

The tokenizer (labels.tokenizers.tokenizer.Tokenizer) that `settings.tokenizer` names, None where that is none of this
family. Of `settings` only tokenizer, stop_words and wordnet are set. The family whose file has the very name that is
configured is asked first, `subword`, which takes any name, last, the others between them in the order of their names.
So a file gives None for whatever is not its own, whether there is a file of that name or not, and imports what takes
time where its tokenizer is made.
"""
