"""History of runs in a store, for the command line and the web interface.

Everything is read through the public reading functions of a journal store. No user code is imported or called
for it.
"""
