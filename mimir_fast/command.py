"""`mimir-fast COMMAND …`, the same commands as `python -m mimir_fast.COMMAND`, and completion of them in a shell.

mimir-fast --help
mimir-fast pretrain --recipe digits/mimir_vit_tiny
source <(mimir-fast --print_completion bash)                          # in ~/.bashrc
mimir-fast --print_completion zsh > ~/.zfunc/_mimir-fast              # a folder that is in $fpath

Several GPUs: torchrun -m mimir_fast.COMMAND, as torchrun starts modules.
"""

import sys
from importlib import import_module

import mimir_fast
from mimir_fast.completion import COMMANDS
from mimir_fast.waiting import spare_busy_cores


def usage() -> str:
    """The text of `mimir-fast --help`: the commands, one line each, and the options."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return f"""usage: mimir-fast COMMAND [OPTIONS]

Fast adversarial masked pre-training of robust vision transformers.

commands:
{chr(10).join(lines)}

options:
  -h, --help                    this list; after a command, its options
  --version                     print the version
  --print_completion bash|zsh   print a completion script: source <(mimir-fast --print_completion bash), or
                                mimir-fast --print_completion zsh > _mimir-fast, in a folder of $fpath

Several GPUs: torchrun --nproc_per_node 8 -m mimir_fast.pretrain …"""


def main() -> None:
    """The console script: hand the line over to the command that it names."""
    spare_busy_cores()
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"mimir_fast {mimir_fast.__version__}")
    elif name.startswith("--print_completion"):
        from mimir_fast.cli import run

        run(print)
    elif name not in COMMANDS:
        from mimir_fast.validation import nearest

        print(f"error: unknown command {name!r}{nearest(name, COMMANDS)}\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv = [f"mimir-fast {name}", *rest]
        try:
            module = import_module(COMMANDS[name].module)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mimir_fast"):
                raise
            from mimir_fast.versions import install_command

            print(f"error: {name} needs {error.name}: {install_command('train')}", file=sys.stderr)
            raise SystemExit(2) from error
        if name == "info":  # it says what is missing, so it may not need it
            module.main()
            return
        from mimir_fast.cli import run

        run(module.main)


if __name__ == "__main__":
    main()
