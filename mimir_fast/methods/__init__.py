"""Methods: each turns a batch into {"loss": …, other scalars}; none owns a loop, an optimiser or a device.

One a file, found by themselves: `register` at the end of the file is all it takes, the command line is made from it.
"""
