"""The one way a safetensors file is written: readable by whom the umask says, as every other file.

safetensors 0.8 writes aside under the mode of temporary files, 0600, and renames: colleagues in the group, a web server
and a container under another user could not read a checkpoint.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, made contiguous, with the mode `open` would give the file, or the one it has.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    from safetensors.torch import save_file

    # A new file shows what the umask is: asking for it means to change it, and other threads write files too.
    new = not path.exists()
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except Exception:
        if new:
            path.unlink()
        raise
    with suppress(OSError):  # a mount without modes
        path.chmod(mode)
