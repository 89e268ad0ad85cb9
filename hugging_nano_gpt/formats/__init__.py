"""The on-disk formats, one file each, and the plain data they all read into (contents.py).

A format module recognises its files by what is in them, reads them into a Checkpoint, and writes one where we write
that format. Checking that a Checkpoint is complete and consistent is the same for all and lives in ../checkpoint.py.
"""
