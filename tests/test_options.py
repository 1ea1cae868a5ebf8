"""options.py: what command lines and config files turn into, and what is said about those that are wrong."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import hypothesis
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from flatgpt.options import check_options, field_types, flatten, parse_options, run_script
from train import TrainConfig

quick = hypothesis.settings(max_examples=25, deadline=None,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@dataclass
class Inner:
    depth: int = 2
    kind: Literal["plain", "fancy"] = "plain"


@dataclass
class Options:
    num_steps: int = 10
    rate: float = 0.5
    is_fast: bool = False
    title: str = "none"
    inner: Inner = field(default_factory=Inner)


DEFAULTS = {"num_steps": 10, "rate": 0.5, "is_fast": False, "title": "none", "depth": 2, "kind": "plain"}


def parse(*argv: str, options: type = Options, **others) -> dict:
    return flatten(parse_options(options, list(argv), **others)[0])


def fault(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the text
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """`config("depth = 3")` writes config.py, or a file of another name, and gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.py") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


# What is understood


@quick
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["num_steps", "depth"]), st.integers(-9, 99)), max_size=6))
def test_later_wins_be_it_a_file_or_an_argument(config, assignments):
    argv = [config(f"{key} = {value}", f"c{i}.py") if in_file else f"--{key}={value}"
            for i, (in_file, key, value) in enumerate(assignments)]
    wanted = {key: value for _, key, value in assignments}
    options, given_keys = parse_options(Options, argv)
    assert flatten(options) == DEFAULTS | wanted
    assert given_keys == {key: str(value) for key, value in wanted.items()}


@pytest.mark.parametrize("argv", [["--num_steps=7"], ["--num-steps=7"], ["--num_steps", "7"], ["--num-steps", "7"]])
def test_arguments_are_spelled_with_equals_or_space_and_underscore_or_hyphen(argv):
    assert parse(*argv) == DEFAULTS | {"num_steps": 7}


@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_true_and_false(config, value):
    assert parse(f"--is_fast={value}")["is_fast"] is value
    assert parse(f"--is_fast={not value}", config(f"is_fast = {value}"))["is_fast"] is value


@quick
@given(title=st.text(), rate=st.floats(allow_nan=False, allow_infinity=False))
def test_texts_and_numbers_arrive_as_they_were_written(config, title, rate):
    wanted = DEFAULTS | {"title": title, "rate": rate}
    assert parse(f"--title={title}", f"--rate={rate!r}") == wanted
    assert parse(config(f"title = {title!r}\nrate = float({str(rate)!r})")) == wanted


def test_names_that_are_no_assignments_of_values_are_no_keys(config):
    assert parse(config("from __future__ import annotations\nimport os, os.path as path\nfrom math import pi\n"
                        "from pathlib import Path\n_depth = 5\n"
                        "def double(x): return 2 * x\nsquare = lambda x: x * x\nclass num_steps_: pass\n"
                        "depth = double(square(3))\n")) == DEFAULTS | {"depth": 18}


def test_what_a_config_takes_over_from_another_counts(config, tmp_path):
    (tmp_path / "base.py").write_text("depth = 18\nunrelated = 3\n")
    assert parse(config(f"exec(open({str(tmp_path / 'base.py')!r}).read())\nrate = 2.0\n")) == DEFAULTS | {
        "depth": 18, "rate": 2.0}


def test_a_config_file_may_begin_with_a_byte_order_mark(config):
    assert parse(config("\ufeffdepth = 18\n")) == DEFAULTS | {"depth": 18}


def test_an_alias_is_another_name_of_its_key():
    aliases = {"name": "title"}
    assert parse("--name=a", aliases=aliases)["title"] == "a"
    assert parse("--name=a", "--title=b", aliases=aliases)["title"] == "b"
    assert parse("--title=b", "--name=a", aliases=aliases)["title"] == "a"


def test_start_is_the_prompt_of_sample(refused):
    assert "nowhere.txt" in refused("sample", "--start=FILE:nowhere.txt")


# What is refused


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("num_steps", "1.5", "a whole number"), ("rate", "fast", "a number"), ("is_fast", "maybe", "True or False"),
    ("kind", "odd", "one of plain, fancy")])
def test_a_value_of_the_wrong_type_is_named_with_its_place(config, key, value, wanted):
    assert fault(f"--{key}={value}") == f"--{key}: {key}={value!r} is not {wanted}"
    assert fault(config(f"\n{key} = {value!r}")) == f"config.py:2: {key}={value!r} is not {wanted}"


@pytest.mark.parametrize(("key", "value", "kind"), [
    ("rate", "nan", "a number"), ("rate", "-inf", "a number"), ("rate", "1e999", "a number"),
    ("num_steps", str(2**63), "a whole number"), ("depth", "-1" + "0" * 40, "a whole number")])
def test_a_number_that_is_none_to_reckon_with_is_named_with_its_place(config, key, value, kind):
    assert fault(f"--{key}={value}") == f"--{key}: {key}={value} is not {kind} that can be reckoned with"
    assert fault(config(f"{key} = type({DEFAULTS[key]})('{value}')")).startswith(f"config.py:1: {key}=")
    assert parse(f"--{key}={value}", f"--{key}=1") == DEFAULTS | {key: 1}  # the later one wins


def test_an_unknown_key_is_named_with_its_place_and_the_closest_key(config):
    for place, argument in (("--num_stps", "--num_stps=3"), ("config.py:3", config("depth = 1\n\nnum_stps = 3"))):
        message = fault(argument)
        assert message.startswith(f"{place}: ")
        assert "'num_stps'" in message
        assert "did you mean 'num_steps'?" in message
    assert "--help" in fault("--qqqqqq=3")


@pytest.mark.parametrize("argv", [["--rate"], ["--rate", "--depth=3"]])
def test_a_key_without_a_value_is_refused(argv):
    assert "--rate=VALUE" in fault(*argv)


def test_all_faults_are_shown_at_once(config):
    message = fault("--num_steps=x", config("depth = 'deep'\nkinds = 1\n"), "--rate=1", "--is_fst=True")
    for part in ("--num_steps: ", "config.py:1: depth", "config.py:2: ", "'kind'?", "--is_fst: ", "'is_fast'?"):
        assert part in message
    assert "rate" not in message


def test_all_faults_of_a_command_fit_one_line(refused, config):
    line = refused("train", config("max_iter = 3\nout_dir = 'x'\n"), "--dtype=int8", "--bias=1.5")
    for part in ("config.py:1: ", "'max_iters'", "--dtype: ", "bfloat16", "--bias: "):
        assert part in line


HELPERS = """import math
from pathlib import Path
hours, num_gpus, base = 2, 8, {"a": 1}
tokens_per_step: int = 12 * 1024
sizes = [n for n in (1, 2)]
for i in range(3):
    scale = i
if (last := i) and Path(__file__).exists():
    with open(__file__) as source:
        depth = len(source.read()[:4])
def double(x):
    inside = 2 * x
    return inside
rate = float(double(math.pi > 3))
_hidden = 1
"""


def test_a_helper_in_a_config_file_is_a_warning_with_its_place(config, capsys):
    assert parse(config(HELPERS)) == DEFAULTS | {"depth": 4, "rate": 2.0}
    lines = capsys.readouterr().err.splitlines()
    places = {"hours": 3, "num_gpus": 3, "base": 3, "tokens_per_step": 4, "sizes": 5, "i": 6, "scale": 7, "last": 8,
              "source": 9}
    assert sorted(lines) == sorted(f"config.py:{line}: warning: {name} is no option and is not used"
                                   for name, line in places.items())


def test_one_rank_speaks_of_helpers(config, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse(config("hours = 3\n"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [
    "n_layers", "learningrate", "batchsize", "eval_intervals", "max_iter", "wandb_name", "n_heads", "nembd", "beta",
    "lr_decay_iter", "warmup_steps", "outdir", "datasets", "drop_out", "gradient_accumulation", "blocksize"])
def test_a_name_like_a_key_is_an_error_in_a_config_file(config, name):
    with pytest.raises(ValueError, match=rf"config\.py:2: unknown key '{name}'; did you mean"):
        parse_options(TrainConfig, [config(f"hours = 1\n{name} = 3\n")])


@pytest.mark.parametrize("name", ["tokens_per_step", "num_gpus", "base", "size", "scale", "gpus", "n", "hours", "root",
                                  "epochs", "now", "tokens_per_iter", "world_size", "data", "ratio"])
def test_a_helper_is_an_error_on_the_command_line_alone(config, name, capsys):
    parse_options(TrainConfig, [config(f"{name} = 10**5000\n")])  # whatever its value
    assert f"config.py:1: warning: {name} is no option" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"--{name}: unknown key '{name}'"):
        parse_options(TrainConfig, [f"--{name}=3"])


def test_a_missing_config_file_is_named(refused):
    line = refused("train", "config/nowhere.py", "--max_iters=3")
    assert "'config/nowhere.py'" in line
    assert "--key=value" in line


@pytest.mark.parametrize(("text", "place", "reason"), [
    ("depth = 3\nrate = = 1\n", "config.py:2", "SyntaxError"),
    ("depth = 3\n\nrate = 1 / 0\n", "config.py:3", "ZeroDivisionError"),
    ("def broken():\n    raise KeyError('lost')\n\nbroken()\n", "config.py:2", "'lost'"),
    ("import nowhere_to_be_found\n", "config.py:1", "nowhere_to_be_found"),
    ("import json\njson.loads('{')\n", "config.py:2", "JSONDecodeError"),
    ("import sys\n\nsys.exit(0)\n", "config.py:3", "SystemExit")])
def test_a_config_file_that_fails_is_named_with_the_line(config, text, place, reason):
    message = fault(config(text))
    assert message.startswith(f"{place}: ")
    assert reason in message


def test_a_key_that_exists_twice_is_a_defect():
    @dataclass
    class Twice:
        depth: int = 1
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(TypeError, match="'depth' exists twice"):
        field_types(Twice)


# What the scripts say


@pytest.mark.parametrize(("script", "options"), [
    ("train", "TrainConfig"), ("sample", "SampleConfig"), ("prepare_data", "PrepareConfig"),
    ("eval", "EvalConfig"), ("plan", "PlanConfig")])
def test_help_lists_every_key_with_its_default(cli, monkeypatch, script, options):
    monkeypatch.setenv("COLUMNS", "80")
    result = cli(script, "--help")
    assert result.code == 0
    text = " ".join(result.out.replace("│", " ").split())
    # --key TYPE ... (default: x), where TYPE may be {one,of} and {None}|INT; a key of many values says (repeatable)
    shown = dict(re.findall(r"--(\w+) (?:[A-Z]+|{[^}]*}(?:\|[A-Z]+)?) .*?\((?:repeatable|default: (.*?))\)", text))
    options = getattr(importlib.import_module(script), options)
    defaults = flatten(options())
    assert shown == {key: shlex.quote(str(value)) if value != () else "" for key, value in defaults.items()}
    assert list(field_types(options)) == list(defaults)


def outcome(main, monkeypatch, capsys, rank: str = "0") -> tuple[int, list[str]]:
    """The exit status of run_script(main), and its lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code, capsys.readouterr().err.splitlines()


def interrupted(argv):
    raise KeyboardInterrupt


def test_what_a_user_can_mend_is_one_line_and_exit_2(monkeypatch, capsys):
    known_by_us = outcome(lambda argv: parse_options(Options, ["--a\nb=1"]), monkeypatch, capsys)
    assert known_by_us == (2, ["error: --a b: unknown key 'a\\nb'; --help lists the keys"])
    assert outcome(lambda argv: Path("nowhere").read_text(), monkeypatch, capsys, rank="3") == (
        2, ["[rank 3] error: [Errno 2] No such file or directory: 'nowhere'"])
    assert outcome(interrupted, monkeypatch, capsys) == (130, ["error: interrupted"])


def test_a_librarys_value_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(json.JSONDecodeError):
        run_script(lambda argv: json.loads("{"))


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")], ids=["Python", "CPU", "CUDA", "MPS"])
def test_a_full_memory_is_one_line_whoever_says_it(capsys, error):
    def fill(argv):
        raise error

    with pytest.raises(SystemExit, match="2"):
        run_script(fill)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory is full: lower what a process holds at a time")


def test_a_runtime_error_of_another_kind_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size"):
        run_script(lambda argv: torch.ones(2) @ torch.ones(3))


def test_a_reader_that_leaves_is_no_error():
    script = ("from flatgpt import options, signals; signals.begin(needs_reader=True); "
              "options.run_script(lambda argv: [print('line', flush=True) for _ in range(100000)])")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


# nanoGPT's users


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_our_config_files_give_the_values_they_assign(path):
    shown = parse(str(path), options=TrainConfig)
    assigned = {name: value for name, value in runpy.run_path(str(path)).items() if not name.startswith("_")}
    assert assigned
    for key, value in assigned.items():
        assert shown[key] == value or shown[key] == str(value), key


def test_nanogpts_defaults_are_kept():
    defaults = flatten(TrainConfig())
    nanogpt = {
        "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
        "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
        "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
        "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
        "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
        "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5}
    assert {key: defaults[key] for key in nanogpt} == nanogpt
    assert {defaults[key] for key in ("device", "dtype", "compile", "backend")} == {"auto"}


def test_a_nanogpt_fine_tuning_config_works(config):
    began = time.time()
    shown = parse(config("""import time

out_dir = 'out-x'
eval_interval = 5
wandb_log = False  # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
learning_rate = 3e-5
decay_lr = False
min_lr = 0
""", "finetune.py"), "--batch_size=2", options=TrainConfig)
    label, clock = shown["wandb_run_name"].split("-")
    assert label == "ft"
    assert began <= float(clock) <= time.time()
    wanted = {"out_dir": "out-x", "eval_interval": 5, "wandb_log": False, "dataset": "shakespeare", "min_lr": 0.0,
              "init_from": "gpt2-xl", "always_save_checkpoint": False, "batch_size": 2, "decay_lr": False,
              "gradient_accumulation_steps": 32, "learning_rate": 3e-5}
    defaults = flatten(TrainConfig())
    assert shown == defaults | wanted | {"wandb_run_name": shown["wandb_run_name"]}


def test_a_nanogpt_pretraining_config_works(config):
    shown = parse(config("""# torchrun --standalone --nproc_per_node=8 train.py config/big.py
wandb_log = True
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # over 8 GPUs
max_iters = 300_000
lr_decay_iters = max_iters
weight_decay = 1e-1
device = 'cpu'
dtype = 'float32'
compile = False
backend = 'gloo'
""", "big.py"), options=TrainConfig)
    assert shown == flatten(TrainConfig()) | {
        "wandb_log": True, "max_iters": 300000, "lr_decay_iters": 300000, "device": "cpu", "dtype": "float32",
        "compile": "False", "backend": "gloo"}


# Home folders


NO_PATHS = {  # text options that are none, in whatever script
    "sample": {"device", "split"}, "eval": {"device", "tasks"}, "report": set(),
    "export": {"checkpoint", "push", "average", "average_weights"},
    "prepare_data": {"dataset", "subset", "split", "revision", "text_column", "name"}, "benchmarks.bench": {"options"},
    "benchmarks.ladder": {"sizes"}, "benchmarks.widths": set(), "benchmarks.zoo": set(),
    "train": {"device", "backend", "wandb_project", "wandb_run_name", "window_pattern", "branch_from"}}
NO_PATHS["plan"] = NO_PATHS["train"] | {"gpus"}
SCRIPTS = {"train": "TrainConfig", "sample": "SampleConfig", "prepare_data": "PrepareConfig",
           "benchmarks.zoo": "ZooConfig", "benchmarks.ladder": "LadderConfig", "benchmarks.widths": "WidthsConfig",
           "eval": "EvalConfig", "export": "ExportConfig", "report": "ReportConfig", "benchmarks.bench": "BenchConfig",
           "plan": "PlanConfig"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tilde_is_the_home_folder_in_every_option_that_takes_a_path(config, monkeypatch, script):
    monkeypatch.setenv("HOME", "/home/me")
    options = getattr(importlib.import_module(script), SCRIPTS[script])
    texts = {key for key, kind in field_types(options).items() if kind in (str, tuple[str, ...])}
    assert texts
    for key in texts:
        value, home = ("FILE:~/a", "FILE:/home/me/a") if key == "prompt" else ("~/a", "/home/me/a")
        wanted = value if key in NO_PATHS[script] else home
        for argv in ([f"--{key}={value}"], [f"--{key}", value]):
            shown = parse(*argv, options=options)[key]
            assert shown == (wanted if isinstance(shown, str) else (wanted,)), key
        assert parse_options(options, [config(f"{key} = {value!r}")])[1] == {key: wanted}


@dataclass
class Paths:
    out: Annotated[str, "path"] = ""
    dataset: Annotated[str, "paths"] = ""
    prompt: Annotated[str, "FILE:path"] = ""
    runs: Annotated[tuple[str, ...], "path"] = ()


@pytest.mark.parametrize(("key", "value", "home"), [
    ("out", "~", "/home/me"), ("out", "~/", "/home/me/"), ("out", "~root/x", f"{os.path.expanduser('~root')}/x"),
    ("out", "~no_such_user/x", "~no_such_user/x"), ("out", "a/~/b", "a/~/b"), ("out", "a~", "a~"),
    ("out", "./~", "./~"), ("out", "~/[ab]*/**", "/home/me/[ab]*/**"), ("out", "x,~/a", "x,~/a"),
    ("dataset", "~/a:0.5,~/b:0.5", "/home/me/a:0.5,/home/me/b:0.5"), ("dataset", "a, ~/b", "a, /home/me/b"),
    ("dataset", "a:1,b~/c", "a:1,b~/c"), ("prompt", "~/a", "~/a"), ("prompt", "~", "~"),
    ("prompt", "FILE:~/a,~/b", "FILE:/home/me/a,~/b"), ("prompt", "See FILE:~/a", "See FILE:~/a")])
def test_a_tilde_counts_where_a_path_begins_and_nowhere_else(config, monkeypatch, key, value, home):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(f"--{key}={value}", options=Paths)[key] == home
    assert parse(config(f"{key} = {value!r}"), options=Paths)[key] == home


def test_a_tilde_in_words_without_a_key_is_the_home_folder_too(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    config("depth = 7", "me/mine.py")
    assert parse("~/mine.py")["depth"] == 7
    with pytest.raises(FileNotFoundError, match=r"no config file '.*/me/mane\.py'; did you mean '.*/me/mine\.py'"):
        parse("~/mane.py")
    assert parse("~/a", "--runs", "~/b", "c", options=Paths, bare_word="runs")["runs"] == tuple(
        f"{tmp_path}/me/{name}" for name in "ab") + ("c",)


@dataclass
class Many:
    runs: tuple[str, ...] = ()
    out: str = "page"
    is_fast: bool = False


@pytest.mark.parametrize("argv", [
    "--runs a b --out=x", "--runs=a --runs=b --out=x", "--runs=a b --out x", "a b --out=x", "a --out=x b",
    "--out=x --runs a --runs b"])
def test_a_key_of_many_values_takes_all_words_up_to_the_next_key(argv):
    assert parse(*argv.split(), options=Many, bare_word="runs") == {"runs": ("a", "b"), "out": "x", "is_fast": False}


def test_a_key_of_many_values_may_have_none():
    assert parse(options=Many)["runs"] == ()
    assert parse("--runs", "a b", "--is_fast", options=Many) == {"runs": ("a b",), "out": "page", "is_fast": True}
    with pytest.raises(ValueError, match="--runs has no value"):
        parse("--runs", "--out=x", options=Many)


def test_of_two_words_where_one_has_its_place_both_are_named():
    with pytest.raises(ValueError, match=r"^a and b: only one out can be named"):
        parse("--is_fast", "a", "b", options=Many, bare_word="out")
    assert parse("--out=--out", "a", options=Many, bare_word="out")["out"] == "a"  # a value that looks like a key


def test_help_may_be_read_only_in_part():
    """`train.py --help | head`."""
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'train.py'))} --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Faults that options show by themselves


def test_all_faults_of_options_and_of_those_nested_in_them_are_one_error():
    argv = ["--seed=-1", "--keep_last=-1", "--batch_size=-2", "--n_head=5", "--min_lr=-1", "--log_interval=0",
            "--device=tpu", "--timeout_s=0"]
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more") as caught:
        check_options(parse_options(TrainConfig, argv)[0])
    for key in ("keep_last=-1", "batch_size=-2", "n_head=5", "min_lr=-1.0", "log_interval=0", "'tpu'", "timeout_s=0"):
        assert key in str(caught.value)


def test_a_model_from_elsewhere_is_not_judged_by_the_part_of_its_shape_that_is_given():
    check_options(parse_options(TrainConfig, ["--init_from=gpt2", "--n_embd=100"])[0])
    with pytest.raises(ValueError, match="n_embd=100 is not divisible by n_head=12"):
        check_options(parse_options(TrainConfig, ["--n_embd=100"])[0])


@pytest.mark.parametrize("script", ["train", "sample", "eval", "prepare_data", "export", "report"])
def test_every_dataclass_of_options_tells_its_faults(script):
    module = importlib.import_module(script)
    classes = [value for name, value in vars(module).items() if name.endswith("Config") and name != "GPTConfig"]
    assert classes
    for options in classes:
        assert isinstance(options().validate(), list), options


@pytest.mark.parametrize(("script", "argv", "named"), [
    ("prepare_data", ["--verify=data/x", "--tokenizer=auto"], "leave out --tokenizer"),
    ("prepare_data", ["--info=data/x", "--text_column=text", "--name="], "leave out --text_column --name"),
    ("prepare_data", ["--input=x.txt", "--split=train"], "split is for data sets of the hub"),
    ("sample", ["--interactive", "--num_samples=10"], "leave out --num_samples"),
    ("sample", ["--split=val", "--start="], "leave out --prompt"),
    ("sample", ["--prompt_tokens=0"], "leave out --prompt_tokens")])
def test_an_option_that_says_nothing_beside_another_is_refused_when_it_names_its_default(refused, script, argv, named):
    assert named in refused(script, *argv)
