"""`python -m stepdistill`."""

from stepdistill.cli import main

main()
