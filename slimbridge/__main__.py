"""`python -m slimbridge`."""

from slimbridge.cli import main

main()
