"""The files around the package: they parse, agree with each other, and name what is there."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_one_and_may_do_little(path: Path) -> None:
    workflow = read(path)
    assert set(workflow) <= {"name", True, "permissions", "concurrency", "jobs"}  # YAML reads `on` as True
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"].startswith("ubuntu-") and set(job.get("permissions", {})) <= {"id-token"}
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "@" in step.get("uses", "@"), f"{step} names no version"
            # What others may write (titles, branch names) never reaches a shell.
            assert "${{" not in step.get("run", "")


def test_ci_runs_the_script_that_everybody_runs() -> None:
    steps = read(ROOT / ".github/workflows/ci.yml")["jobs"]["ci"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run" and (ROOT / ".ci/run").is_file()


def test_commands_of_workflows_are_there() -> None:
    for path in WORKFLOWS:
        for job in read(path)["jobs"].values():
            for step in job["steps"]:
                for file in re.findall(r"\S+\.py\b|\.ci/\S+", step.get("run", "")):
                    assert (ROOT / file).is_file(), f"{path.name}: {file}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_an_issue_template_is_one(path: Path) -> None:
    form = read(path)
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert part["attributes"].get("label")
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)


def test_citation() -> None:
    """The file, its BibTeX twin and the model card name the same version, paper and people."""
    from mimir_fast.hub_card import BIBTEX

    cff, bibtex = read(ROOT / "CITATION.cff"), (ROOT / "CITATION.bib").read_text()
    assert cff["cff-version"] == "1.2.0" and cff["license"] == PROJECT["project"]["license"]
    assert cff["version"] == PROJECT["project"]["version"] and f"version = {{{cff['version']}}}" in bibtex
    paper = cff["preferred-citation"]
    people = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert BIBTEX in bibtex and f"{{{people}}}" in BIBTEX
    assert paper["title"] in BIBTEX.replace("{MIMIR}", "MIMIR") and str(paper["year"]) in BIBTEX


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local" and [hook["id"] for hook in local["hooks"]] == ["ruff-format", "ruff", "mypy"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in local["hooks"]:
        assert hook["language"] == "system" and f"/{hook['entry'].split('/')[-1].split()[0]}" in lint


def test_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    words = [line.split() for line in lines if line.strip()]
    assert {line[0] for line in words} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "CMD", "ENV"}
    assert words[0][0] == "FROM" and sum(line[0] == "FROM" for line in words) == 2
    for line in words:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            assert all((ROOT / source).exists() for source in line[1:-1]), line
    # Started as the owner of a mount, who has no entry in /etc/passwd: a home to write to, and a name for getpass.
    (environment,) = [dict(word.split("=") for word in line[1:]) for line in words if line[0] == "ENV"]
    assert environment.keys() == {"HOME", "USER", "LOGNAME"} and f"chmod 1777 {environment['HOME']} /work" in text
    assert "docker run" in text and all("--user $(id -u):$(id -g)" in run for run in text.split("docker run")[1:])
    # What setup.py and pyproject.toml need is copied.
    copied = {source for line in words if line[0] == "COPY" for source in line[1:-1]}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "mimir_fast"} <= copied
    extras = {name for names in re.findall(r"\[([a-z,]+)\]\"", text) for name in names.split(",")}
    assert extras and extras <= set(PROJECT["project"]["optional-dependencies"])


def test_wheels_are_built_for_every_python_that_is_promised() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    lowest = int(PROJECT["project"]["requires-python"].removeprefix(">=3."))
    versions = re.fullmatch(r"cp3\{([\d,]+)\}-manylinux_x86_64", settings["build"])
    assert versions is not None and min(map(int, versions.group(1).split(","))) == lowest
    assert "--exclude libgomp.so.1" in settings["repair-wheel-command"]


def test_extras_name_each_other() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for requirements in extras.values():
        for requirement in requirements:
            if own := re.fullmatch(r"mimir-fast\[(.*)\]", requirement):
                assert set(own.group(1).split(",")) <= set(extras)


def test_messages_name_extras_that_are_there() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    for path in (ROOT / "mimir_fast").rglob("*.py"):
        assert set(re.findall(r"install_command\(['\"]([a-z-]+)", path.read_text())) <= extras, path
