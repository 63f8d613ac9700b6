"""Stage 2: the lean trainer and the protocols that say what its encoder is worth. Imports `labels`, never `preprocess`."""
