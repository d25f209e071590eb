"""Every kernel and tile compiled for chips that are not here: ``python -m tests.portability``.

Writes a table of registers, local memory and shared memory, and fails on a kernel that does not
compile, does not fit, or goes through local memory in a loop. ``tests/test_compile.py`` is the part
of it that every change runs.
"""
