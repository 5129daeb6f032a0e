"""`python -m tokentree`."""

from tokentree.cli import main

main()
