"""Options: config files and --key=value arguments -> a validated dataclass.

Owns how options are written down, not which there are: each module has a dataclass of its own, which tells its faults
(`validate() -> list[str]`), a script composes them, and all keys are flat, so no key may exist twice. A command line
reads

    train.py [config/file.py ...] [--key=value ...]

left to right, later wins. A config file is plain Python; its public names that are not modules, functions or classes
are keys, and those that are like no key are helpers of the file's own, which a warning names. Its assignments become
arguments in the place where the file stood, so that one validator (tyro, on the dataclass) serves both. `--key value`,
`--some-key=value`, and `--key` for `--key=True` are understood too. A key whose type is a tuple takes all words up to
the next --key (`--runs a b`, as a shell writes out/*), and adds to those before.

An option that takes a path says so in its type: Annotated[str, "path"]; "paths" where the value is a list of names with
commas between them, "FILE:path" where it is a path only behind FILE:. There a ~ is the home folder, as in a shell.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from flatgpt import launcher, signals

T = TypeVar("T")
TYPO = 0.8  # how like a key (1 = the same) a name in a config file must be to be no helper but a misspelled key
PROJECT = Path(__file__).resolve().parent.parent
OURS = ("flatgpt", "benchmarks")  # its folders of code


@dataclasses.dataclass
class Argument:
    key: str
    value: Any  # a text, or what a config file has
    where: str  # "--key" or "config/file.py:12", for messages
    is_assignment: bool = False  # in a config file


def parse_options(options: type[T], argv: list[str], usage: str = "", aliases: dict[str, str] | None = None,
          bare_word: str = "") -> tuple[T, dict[str, str]]:
    """The options in argv, and the keys that were set there with the value each got.

    `usage` heads the --help, `aliases` are other names for keys, `bare_word` is the key that a word without -- sets
    (instead of naming a config file). Raises ValueError that lists every unknown key (with
    the closest known one) and every value of a wrong type, each with the place where it stood. A name in a config file
    that is like no key is a helper of that file, and only a warning.
    """
    if {"-h", "--help"} & set(argv):
        _tyro(options, ["--help"], usage)
    known, paths = field_types(options), field_types(options, with_notes=True)
    arguments, faults, helpers = [], [], []
    for argument in _expand(argv, bare_word, known):
        argument.key = (aliases or {}).get(argument.key, argument.key)
        if argument.key in known:
            argument.value = _expand_home(str(argument.value), paths[argument.key])
            arguments.append(argument)
            continue
        if argument.is_assignment and not closest(argument.key, known, TYPO):
            helpers.append(f"{argument.where}: warning: {argument.key} is no option and is not used")
            continue
        hint = closest(argument.key, known) or "--help lists the keys"
        faults.append(f"{argument.where}: unknown key {argument.key!r}; {hint}")
    given = {a.key: a.value for a in arguments}
    effective = [a for a in {a.key: a for a in arguments}.values() if not _is_many(known[a.key])]
    effective += [a for a in arguments if _is_many(known[a.key])]
    overridden = [a for a in arguments if a not in effective]  # has to be right as well
    try:  # all at once: one by one would take ten times as long
        parsed, refusal, suspects = _parse(options, effective), "", overridden
    except ValueError as error:
        parsed, refusal, suspects = None, str(error), arguments
    faults += [f"{a.where}: {a.key}={a.value!r} is not {_describe(known[a.key])}" for a in suspects
               if not _accepts(options, a)]
    if parsed is not None:
        values = flatten(parsed)
        faults += [f"{a.where}: {a.key}={a.value} is not {_describe(known[a.key])} that can be reckoned with"
                   for a in effective if not _is_usable(values[a.key])]
    if faults or parsed is None:
        raise ValueError("; ".join(faults) or refusal)
    for line in helpers if launcher.is_rank0() else []:
        print(line, file=sys.stderr, flush=True)
    return parsed, given


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """A question that offers the known word most like this one, or "" when none is so like it."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=likeness)
    return f"did you mean {close[0]!r}?" if close else ""


def field_types(options: type, with_notes: bool = False) -> dict[str, Any]:
    """Key -> type of every option, nested dataclasses included, with what Annotated says of it if asked for. Raises
    TypeError for a key that exists twice."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(options, include_extras=with_notes)
    for field in dataclasses.fields(options):
        inner = field_types(hints[field.name], with_notes) if dataclasses.is_dataclass(hints[field.name]) else {
            field.name: hints[field.name]}
        if twice := found.keys() & inner.keys():
            raise TypeError(f"{options.__name__}: option {twice.pop()!r} exists twice")
        found |= inner
    return found


def flatten(options: Any) -> dict[str, Any]:
    """Key -> value of every option, flat."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def check_options(options: Any, given: Collection[str] = ()) -> None:
    """Raises one ValueError that lists all faults which options, and those nested in them, show by themselves.

    A dataclass tells its faults in `validate()`, and in `conflicts(given)`, where it has that, which of the `given`
    keys exclude each other."""
    if faults := _faults(options, given):
        raise ValueError("; ".join(faults))


def _faults(options: Any, given: Collection[str]) -> list[str]:
    faults = options.validate()
    if hasattr(options, "conflicts"):
        faults += options.conflicts(given)
    values = [getattr(options, field.name) for field in dataclasses.fields(options)]
    return faults + [fault for value in values if dataclasses.is_dataclass(value) for fault in _faults(value, given)]


def failed_rules(options: Any, *rules: tuple[str, bool, str]) -> list[str]:
    """`key=value must be ...` for each rule (key, whether it holds, what the value must be) that does not hold."""
    return [f"{key}={getattr(options, key)} must be {what}" for key, holds, what in rules if not holds]


def _expand(argv: list[str], bare_word: str, known: dict[str, Any]) -> list[Argument]:
    """Config files replaced by their assignments; `--key value` joined; `--key` of a bool means True.

    Raises ValueError for a key without a value, and for two words where one has its place."""
    arguments, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words = [argument.where for argument in arguments if not argument.where.startswith("--")]
            if bare_word and words and not _is_many(known[bare_word]):
                raise ValueError(f"{words[0]} and {word}: only one {bare_word} can be named")
            arguments += [Argument(bare_word, word, word)] if bare_word else _read_config(word, known)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and known.get(key.replace("-", "_")) is bool and (not rest or rest[0] not in ("True", "False")):
            value = "True"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{word} has no value; write {word}=VALUE")
            value = rest.pop(0)
        arguments.append(Argument(key.replace("-", "_"), value, f"--{key}"))
        while _is_many(known.get(arguments[-1].key)) and rest and not rest[0].startswith("--"):
            arguments.append(Argument(arguments[-1].key, rest.pop(0), f"--{key}"))
    return arguments


def _expand_home(value: str, kind: Any) -> str:
    """A value with ~ and ~user as home folders, where an option of this type has a path."""
    places = {"path": "^", "paths": r"(?:^|,)\s*", "FILE:path": "^FILE:"}  # of the ~
    for form in getattr(kind, "__metadata__", ()):
        value = re.sub(f"({places[form]})(~[^/,]*)", lambda found: found[1] + os.path.expanduser(found[2]), value)
    return value


def _is_usable(value: Any) -> bool:
    """False for a number that is not finite, and for a whole one that takes more than 64 bits."""
    return abs(value) < 2**63 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def _is_many(kind: Any) -> bool:
    """Whether an option of this type takes several values."""
    return typing.get_origin(kind) is tuple


def _read_config(path: str, known: Iterable[str]) -> list[Argument]:
    """A config file's assignments. Raises FileNotFoundError, or ValueError with the line that fails.

    A name that is not assigned in the file itself (`from base import *`) counts when it is a known key; what else an
    import brings along does not."""
    path = os.path.expanduser(path)
    if not Path(path).is_file():
        key = path.strip("-").partition("=")[0].replace("-", "_")
        hint = f"did you mean --{path.strip('-')}?" if key in known else (
            closest(path, [str(file) for file in Path(path).parent.glob("*.py")]) or "options are written --key=value")
        raise FileNotFoundError(f"no config file {path!r}; {hint}")
    try:
        lines = _assignment_lines(path)
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # the file is the user's program: it can fail in any way
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else None
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{path}:{line or ''}: {type(error).__name__}: {what}") from None
    return [Argument(name, value, f"{path}:{lines[name]}" if name in lines else path, is_assignment=True)
            for name, value in names.items()
            if (name in lines or name in known) and not name.startswith("_") and not _is_code(value)]


def _is_code(value: object) -> bool:
    """Modules, functions and classes are no options."""
    return callable(value) or isinstance(value, types.ModuleType)


def _assignment_lines(path: str) -> dict[str, int]:
    """Name -> line of its last assignment; names that are only imported are not in it."""
    tree = ast.parse(Path(path).read_bytes(), filename=path)
    return {node.id: node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _accepts(options: type, argument: Argument) -> bool:
    """Whether the value is one of the option's type."""
    try:
        _parse(options, [argument])
    except ValueError:
        return False
    return True


def _parse(options: type[T], arguments: list[Argument]) -> T:
    """Raises ValueError, with what tyro says, for a value of another type."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return _tyro(options, [f"--{a.key}={a.value}" for a in arguments])
    except SystemExit:
        raise ValueError(said.getvalue()) from None


def _tyro(options: type[T], arguments: list[str], usage: str = "") -> T:
    import tyro

    return tyro.cli(options, args=arguments, prog=Path(sys.argv[0]).name, description=usage or None,
                    use_underscores=True, config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes,
                                               tyro.conf.UseAppendAction))


def _describe(kind: Any) -> str:
    """A type in a user's words."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if args := [a for a in typing.get_args(kind) if a is not type(None)]:
        return f"{_describe(args[0])} or None"
    return {int: "a whole number", float: "a number", bool: "True or False"}.get(kind, "a text")


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on the command line. What a user can mend is printed as one line, and the exit status is 2.

    That is: OSError, which names its file, and ValueError raised by flatGPT's own code. Anything else, a library's
    ValueError too, is a defect, and keeps its traceback.
    """
    try:
        with signals.interruptible():
            try:
                main(sys.argv[1:])
            finally:
                sys.stdout.flush()  # what cannot be written is known here, and not when Python ends
    except BrokenPipeError:  # the reader of our output, `head` for one, has left (see signals.begin)
        sys.exit(1)
    except (OSError, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        is_ours = raised_in.parent == PROJECT or any(raised_in.is_relative_to(PROJECT / folder) for folder in OURS)
        if isinstance(error, ValueError) and not is_ours:
            raise
        sys.exit(_complain(str(error)))
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError, in other words on a CPU, a GPU and MPS
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        sys.exit(_complain("the memory is full: lower what a process holds at a time, the batch, a prompt's length or "
                           f"the model's size ({(str(error) or 'MemoryError').splitlines()[0]})"))
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(130)


def _complain(message: str) -> int:
    label = "error" if launcher.is_rank0() else f"[rank {os.environ['RANK']}] error"
    sys.stderr.write(f"{label}: {' '.join(message.split())}\n")  # in one piece: other ranks may write there too
    sys.stderr.flush()
    return 2
