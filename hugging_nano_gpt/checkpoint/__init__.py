"""Files to plain data and back: one module for each format, and the plain data that all of them read into.

formats.py has the table of formats, read_checkpoint and write_checkpoint; contents.py the data. file.py opens a file
and torch_pickle.py reads its pickle without executing it. state_dict.py is what the formats share: names are cleaned
and compared with layout.py, tensors are read; faults.py finds what is wrong. Nothing here imports a model.
"""
