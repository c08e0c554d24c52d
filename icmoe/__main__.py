"""`python -m icmoe`."""

from icmoe.cli import main

main()
