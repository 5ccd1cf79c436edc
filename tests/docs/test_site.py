"""The site builds without a warning, and the tutorial types what the commands propose."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import doc_commands as known
import pytest
from commands import command_environment
from doc_blocks import ROOT, blocks_of, prose_of

from mimir_fast.finetune import config_from as finetune_config
from mimir_fast.pretrain import config_from as pretrain_config
from mimir_fast.recipes.following import after_finetuning, after_pretraining

MOST_LINES_OF_THE_README = 130


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; broken links, anchors and references are errors."""
    if find_spec("mkdocstrings") is None:
        pytest.skip("needs MkDocs: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = command_environment() | {"NO_MKDOCS_2_WARNING": "1"}
    out = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr
    return folder


def test_the_reference_is_rendered(site: Path) -> None:
    page = (site / "api/estimators/index.html").read_text()
    assert 'id="mimir_fast.ops.hsic.hsic"' in page
    assert page.count("doc-section-title") >= 8, "parameters and results of each estimator"


def test_pages_ask_no_other_server_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in re.findall(r'<(?:script|img)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"', page.read_text()):
            assert not re.match(r"https?:|//", address[0] or address[1]), f"{page.relative_to(site)}: {address}"


def test_the_tutorial_types_what_is_proposed() -> None:
    typed = [" ".join(words) for b in blocks_of(ROOT / "docs/tutorial.md") if b.marker == "run" for words in b.commands]
    module, args = known.module_of(known.make_command("pretrain")) or ("", [])
    assert typed[0] == "make pretrain" and module == "mimir_fast.pretrain"
    pretraining = pretrain_config(args)
    proposed = after_pretraining(pretraining)
    assert shlex.join(["python", "-m", *proposed]) in typed
    assert shlex.join(["python", "-m", *after_finetuning(finetune_config(proposed[1:]))]) in typed


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES_OF_THE_README


def test_links_of_the_readme_lead_to_files() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "launch/README.md", "benchmarks/README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose_of(ROOT / page)):
            assert ((ROOT / page).parent / target).is_file(), f"{page}: {target}"
