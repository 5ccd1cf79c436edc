"""The console script `mimir-fast`: its commands, their help and what that imports, and completion in a real shell."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mimir_fast import command
from mimir_fast.cli import run
from mimir_fast.completion import command_lines, script
from mimir_fast.versions import install_command

ROOT = Path(__file__).parents[1]
# What takes a tenth of a second or more to import, and no --help needs.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.checkpoint", "torch.distributed.tensor",
         "torch.distributed.fsdp", "timm", "torchvision", "matplotlib", "sklearn", "scipy", "PIL", "xformers",
         "nvidia.dali", "tensorboard", "webdataset", "huggingface_hub", "rich.progress", "wandb", "triton")  # fmt: skip
HELP = """
import contextlib, io, sys
from mimir_fast import command
assert "torch" not in sys.modules
for name in command.COMMANDS:
    if name == "hub":
        continue
    sys.argv, said = ["mimir-fast", name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command.main()
    words = said.getvalue()
    assert words.startswith(f"usage: mimir-fast {name}"), words
    assert "--print_completion bash|zsh" in " ".join(words.split()), words
print([module for module in %r if module in sys.modules])
"""


def test_every_command_has_help_and_imports_nothing_heavy_for_it() -> None:
    out = subprocess.run([sys.executable, "-c", HELP % (HEAVY,)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["mimir-fast", *line])
        command.main()
        said = capsys.readouterr().out
        assert all(f"\n  {name} " in said and entry.summary in said for name, entry in command.COMMANDS.items())


def test_the_script_is_installed_under_that_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mimir-fast": "mimir_fast.command:main"}


def test_a_command_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mimir-fast", "recipes", "list", "digits/pgd"])
    command.main()
    assert "digits/pgd_vit_tiny" in capsys.readouterr().out


def test_an_unknown_command_suggests_the_nearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mimir-fast", "pretrian"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "unknown command 'pretrian'" in said and "did you mean pretrain?" in said


# One process imports PyTorch for all of them, which takes most of the time.
WITHOUT_EXTRAS = """
import os, runpy, sys, torch
sys.modules["tyro"] = None
for module in ("compare", "pretrain", "export", "recipes"):
    if os.fork() == 0:
        if module == "compare":
            from mimir_fast.command import main
            sys.argv = ["mimir-fast", module]
            main()
        sys.argv = ["-m"]
        runpy.run_module(f"mimir_fast.{module}", run_name="__main__", alter_sys=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)  # or the next child prints it too
"""


def test_without_the_extras_it_says_what_to_install_in_one_line() -> None:
    """`mimir-fast compare`, and `python -m mimir_fast.pretrain` after `pip install .`, which brings torch only."""
    out = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=False)
    assert out.stdout.split() == ["2"] * 4
    command, *modules = out.stderr.splitlines()
    assert command == f"error: compare needs tyro: {install_command('train')}"
    assert len(modules) == 3
    assert all(said.startswith("error: commands need tyro, and what else `pip install") for said in modules)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_module_knows_print_completion(name: str) -> None:
    source = (ROOT / (command.COMMANDS[name].module.replace(".", "/") + ".py")).read_text()
    # `info` must run without tyro, and has the option itself; models of the Hub load without tyro.
    imported = "    from mimir_fast.cli import run\n\n" if name == "hub" else ""
    assert source.endswith(f'if __name__ == "__main__":\n{imported}    {"main()" if name == "info" else "run(main)"}\n')
    assert name in command_lines()


def test_print_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mimir_fast.compare import main

    wanted = script("zsh").rstrip()
    monkeypatch.setattr(sys, "argv", ["compare.py", "--print_completion=zsh"])
    run(main)
    assert capsys.readouterr().out.rstrip() == wanted
    monkeypatch.setattr(sys, "argv", ["mimir-fast", "info", "--print_completion", "zsh"])
    command.main()
    assert capsys.readouterr().out.rstrip() == wanted
    for wrong in (["--print_completion", "tcsh"], ["--print_completion"]):
        monkeypatch.setattr(sys, "argv", ["mimir-fast", *wrong])
        with pytest.raises(SystemExit):
            command.main()
        assert "wanted bash or zsh" in capsys.readouterr().err


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "completion.sh").write_text(script("bash"))
    lines = ["pret", "pretrain --rec", "evaluate --suite q", "finetune --attack.ep", "reproduce dig", "info --h"]
    asked = "\n".join(f"complete_line mimir-fast {line}" for line in lines)
    program = f"""source {tmp_path}/completion.sh
name=$(complete -p mimir-fast | sed 's/.*-F \\([^ ]*\\).*/\\1/')
complete_line() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); "$name"; echo "${{COMPREPLY[@]}}"; }}
{asked}"""
    out = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:-1] == ["pretrain", "--recipe", "quick", "--attack.eps", "digits_demo", "--help"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here: apt-get install zsh")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    (tmp_path / "_mimir-fast").write_text(script("zsh"))
    subprocess.run(["zsh", "-n", tmp_path / "_mimir-fast"], check=True)
    program = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -uD; echo ${{_comps[mimir-fast]}}"
    out = subprocess.run(["zsh", "-fc", program], capture_output=True, text=True, check=True)
    assert out.stdout == "_mimir-fast\n" and not out.stderr
