"""Files to plain data and back: a file a format, and the plain data they all read into (contents.py).

A format module recognises its files by what is in them, reads them into a Checkpoint, and writes one where we write
that format. read_write.py picks the format and checks what is the same for all. Nothing here knows a model.
"""
