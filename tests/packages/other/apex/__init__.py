"""What the package apex of PyPI looks like from outside: another project of the same name."""
