"""A module of its own, which the processes of the ranks do not import once more."""

from . import main

main()
