"""Stage 2: the lean trainer, and the protocols that evaluate its encoder. Imports `labels`, never `preprocess`."""
