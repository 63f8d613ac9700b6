"""One file a family of tokenizers; a new file is a new family. What it holds:

    def make(settings: Labels) -> Tokenizer | None

The tokenizer (preprocess.tokens.tokenizer.Tokenizer) that `settings.tokenizer` names, None where that is none of this family. Of `settings`
only tokenizer, stop_words and wordnet are set. The family whose file has the very name that is configured is asked first, `subword`, which
takes any name, last, the others between them in the order of their names: so a file should import what it needs for its tokenizers alone
where they are made, and say None to a name that it does not know, file or not.
"""
