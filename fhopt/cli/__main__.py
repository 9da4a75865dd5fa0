"""`python -m fhopt.cli`: the command line without the installed script."""

from fhopt.cli import main

main()
