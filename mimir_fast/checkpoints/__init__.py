"""Checkpoints that survive any kill and load without unpickling code.

A checkpoint is a folder: one safetensors file a rank, written by torch.distributed.checkpoint (so it can be read back
on another number of ranks), and `meta.json`, written last, which names every file with its size and the CRC-32 of each
block, and carries its own. It is written aside as `NAME.partial`, synced to disk and renamed: a folder without a suffix
is whole.

Tensor names: `model/<parameter>`, `ema/<parameter>`, `optimizer/<parameter>/<state>`.

    dcp           folders of torch.distributed.checkpoint, others' and for others
    checksums     of files and of meta.json
    durable       writing that a kill or a power cut cannot leave half done
    reading       what is in a checkpoint, whether it is whole, which one of a run
    saving        writing one, beside training if wanted
    tensor_files  a safetensors file under the mode that the umask gives
    trial         whether the storage can do what a run asks of it
"""
