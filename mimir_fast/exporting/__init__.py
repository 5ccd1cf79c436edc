"""From weights of ours to files that other programs read.

`original.py` is what is exported, as a function of images; `formats/` has one file a format, each with its writer and
with its own library's reader; `compare.py` holds the two against each other before anything counts as written.
"""
