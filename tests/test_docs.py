"""The documents hold to the code: the numbers of docs/models.md are what docs/examples.py prints, links lead somewhere,
and the maps name the modules that there are."""

import importlib
import importlib.util
import re

import pytest
from conftest import ROOT, run_process

DOCS = ROOT / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
COMMANDS = re.findall(r"^python (\w+)\.py(.*)$", SHELL, re.M)


PAGES = [*map(ROOT.joinpath, ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CONTRIBUTING.md")),
         *sorted(DOCS.glob("*.md"))]
FOLDERS = sorted(init.parent for init in (ROOT / "flatgpt").rglob("__init__.py"))


def without_code(page: str) -> str:
    return re.sub(r"```.*?```", "", page, flags=re.S)


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", without_code(page), re.M)}


def modules_named(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\.py\b", text))


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", without_code(text)):
        path, _, heading = target.partition("#")
        if path.startswith("https://"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not heading or heading in anchors(found.read_text(encoding="utf-8")), target


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert [page.name for page in PAGES[1:] if f"]({page.relative_to(ROOT)})" not in text] == []


def test_architecture_names_modules_that_exist():
    there = {path.name for folder in ("", "benchmarks", "docs", "tests") for path in (ROOT / folder).glob("*.py")}
    there |= {path.name for folder in FOLDERS for path in folder.glob("*.py")}
    assert modules_named((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")) - there == set()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_map_of_a_folder_names_its_modules(folder):
    there = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    named = modules_named((folder / "__init__.py").read_text(encoding="utf-8"))
    assert there <= named
    assert named - there <= {"model.py"}  # the one that stands at the top


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_commands_name_options_that_exist(cli, script, arguments):
    known = cli(script, "--help").out
    for key in re.findall(r"--(\w+)", arguments):
        assert re.search(rf"--{key}\b", known), f"{script}.py has no --{key}"
    for config in re.findall(r"config/\w+\.py", arguments):
        assert (ROOT / config).is_file()
