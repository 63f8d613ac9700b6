"""One file per family of tokenizers; a new file is a new family. Its only entry point:

    def make(settings: Labels) -> Tokenizer | None

returns the tokenizer that `settings.tokenizer` names, or None if it is not of this family. Of `settings` only
tokenizer, stop_words and wordnet are set. The family with the configured name is tried first, `subword`, which accepts
any name, last, the others in the order of their names. `make` imports what takes time.
"""
