"""`python -m stream` is `tocsin`."""

from stream.cli import main

main()
