"""`python -m train` is the command `train`."""

from train.cli import main

main()
