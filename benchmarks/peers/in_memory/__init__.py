"""The same work in memory on different libraries, each in a process and a virtual environment of its own."""
