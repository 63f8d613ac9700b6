"""`python -m preprocess` is the command `preprocess`."""

from preprocess.cli import main

main()
