"""docs/models.md: its numbers are what docs/examples.py prints, and what it points at exists."""

import importlib
import importlib.util
import re

import pytest
from conftest import ROOT, run_process

DOCS = ROOT / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
COMMANDS = re.findall(r"^python (\w+)\.py(.*)$", SHELL, re.M)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_block_of_numbers_is_what_the_script_prints():
    printed = run_process(DOCS / "examples.py", cwd=ROOT).rstrip("\n").split("\n\n")
    assert re.findall(r"```text\n(.*?)\n```", PAGE, re.S) == printed


def test_no_number_would_round_otherwise_elsewhere(monkeypatch):
    spec = importlib.util.spec_from_file_location("examples", DOCS / "examples.py")
    examples = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.path", [*importlib.sys.path])  # the script adds to it
    spec.loader.exec_module(examples)
    values = []
    monkeypatch.setattr(examples, "number", lambda value: values.append(abs(float(value))) or "")
    for block in examples.BLOCKS:
        list(block())
    assert len(values) > 200
    hundredths = [100 * value for value in values if value != float("inf")]
    assert [h / 100 for h in hundredths if abs(h % 1 - 0.5) < 0.01] == []


@pytest.mark.parametrize(("name", "target"), re.findall(r"\[`(\w+\.[\w.]+)`\]\((.*?)\)", PAGE))
def test_what_a_link_names_exists(name, target):
    module, _, path = name.partition(".")
    assert target.rpartition("/")[2] == f"{module}.py"
    if path == "py":  # a file by its name
        return
    found = importlib.import_module(target.removeprefix("../").removesuffix(".py").replace("/", "."))
    for part in path.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        assert hasattr(found, part) or part in fields, f"{name}: {found} has no {part}"
        found = getattr(found, part, None)


def test_links_lead_somewhere():
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(targets) > 40
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (DOCS / target).exists(), target
    assert "](docs/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_commands_name_options_that_exist(cli, script, arguments):
    known = cli(script, "--help").out
    for key in re.findall(r"--(\w+)", arguments):
        assert re.search(rf"--{key}\b", known), f"{script}.py has no --{key}"
    for config in re.findall(r"config/\w+\.py", arguments):
        assert (ROOT / config).is_file()
