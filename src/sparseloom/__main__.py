"""`python -m sparseloom`: the command line."""

from sparseloom.cli.boundary import main

main()
