"""Bugs put into the kernels by hand, and a run that says which of them the tests notice."""
