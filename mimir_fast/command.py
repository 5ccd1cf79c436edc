"""`mimir-fast COMMAND …`, the same commands as `python -m mimir_fast.COMMAND`, and completion of them in a shell.

mimir-fast --help
mimir-fast pretrain --recipe digits/mimir_vit_tiny
source <(mimir-fast --print_completion bash)                          # in ~/.bashrc
mimir-fast --print_completion zsh > ~/.zfunc/_mimir-fast              # a folder that is in $fpath

Several GPUs: torchrun -m mimir_fast.COMMAND, as torchrun starts modules.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import mimir_fast

SHELLS = ("bash", "zsh")

# name: (module, what it does)
COMMANDS = {
    "pretrain": ("mimir_fast.pretrain", "pre-train a masked autoencoder: MIMIR and its relatives"),
    "finetune": ("mimir_fast.finetune", "fine-tune it into a robust classifier"),
    "evaluate": ("mimir_fast.evaluate", "attack any classifier and write a report"),
    "compare": ("mimir_fast.compare", "finished evaluations side by side"),
    "export": ("mimir_fast.export", "take the weights of a run to timm, or into one file"),
    "hub": ("mimir_fast.hub", "put a run on the Hugging Face Hub, or into a folder like one, with a model card"),
    "prepare": ("mimir_fast.data.prepare", "write a data set as shards that are fast to read"),
    "recipes": ("mimir_fast.recipes.__main__", "list recipes, published numbers, what is implemented"),
    "reproduce": ("mimir_fast.reproduce", "whole experiments: several runs, one table"),
    "info": ("mimir_fast.info", "which backends run here, at which versions"),
}


def usage() -> str:
    """What `mimir-fast --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
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
    """The console script."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"mimir_fast {mimir_fast.__version__}")
    elif name.startswith("--print_completion"):
        run(print)
    elif name not in COMMANDS:
        from mimir_fast.validation import nearest

        print(f"error: unknown command {name!r}{nearest(name, COMMANDS)}\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv = [f"mimir-fast {name}", *rest]
        try:
            module = import_module(COMMANDS[name][0])
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mimir_fast"):
                raise
            print(f"error: {name} needs {error.name}: pip install 'mimir-fast[train]'", file=sys.stderr)
            raise SystemExit(2) from error
        # `info` says what is missing, so it may not need it.
        (module.main if name == "info" else partial(run, module.main))()


def run(main: Callable[[], None]) -> None:
    """Run a command as a program: errors that users can cause are one line, and `--print_completion SHELL` is known."""
    from mimir_fast.training.cli import exit_on_error, peek

    args = sys.argv[1:]
    if not any(arg.split("=")[0] == "--print_completion" for arg in args):
        exit_on_error(main)
        return
    from mimir_fast.completion import script

    shell = peek(args, "--print_completion")
    if shell not in SHELLS:
        print(f"error: --print_completion {shell or ''}: wanted {' or '.join(SHELLS)}", file=sys.stderr)
        raise SystemExit(2)
    print(script(shell))


if __name__ == "__main__":
    main()
