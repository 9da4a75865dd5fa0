"""`python -m fhopt.cli`: the command line without the script that installation makes."""

from fhopt.cli import main

main()
