"""What is run: a command line into supervised processes and exit codes.

The way in is ``python -m bridge.launch``. Nothing outside this package imports it, but for that door.
"""
