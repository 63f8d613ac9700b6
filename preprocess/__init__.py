"""Stage 1: shards in, sparse labels, IDF table and betons out; every caption tokenized once, CPU only, no torch."""
