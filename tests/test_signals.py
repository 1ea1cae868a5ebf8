"""launcher.py's standard streams: no encoding, closed stream or reader that has left ends a run."""

import errno
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_RUN

from flatgpt import signals

TEXT = "a \x80 é € 你 😀 \udc80"
# As a script does: what a reader or a disk refuses is known in `main`, and not when Python ends.
SCRIPT = """
from flatgpt import signals
import sys
signals.begin(needs_reader=sys.argv.pop(1) == "needed")
from flatgpt.options import run_script
run_script(lambda argv: [print(i, flush="flush" in argv) for i in range(3)])
"""


def python(code: str, *args: str, shell: str = "", **how) -> subprocess.CompletedProcess:
    """`python -c code args...`, which can import flatgpt; `shell`: redirections of its streams."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", code, *args]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | how
    env = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    return subprocess.run(command, env=env, timeout=60, check=False, **how)


@pytest.fixture
def left():
    """The writing end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(("env", "encoding", "escaped"), [
    ({"PYTHONIOENCODING": "ascii"}, "ascii", r"a \x80 \xe9 \u20ac \u4f60 \U0001f600 \udc80"),
    ({"PYTHONIOENCODING": "ascii:strict"}, "ascii", r"a \x80 \xe9 \u20ac \u4f60 \U0001f600 \udc80"),
    ({"PYTHONIOENCODING": "latin-1"}, "latin-1", "a \x80 é " r"\u20ac \u4f60 \U0001f600 \udc80"),
    ({"PYTHONIOENCODING": "cp1252"}, "cp1252", r"a \x80 é € \u4f60 \U0001f600 \udc80"),
    ({"PYTHONIOENCODING": "utf-16"}, "utf-16", "a \x80 é € 你 😀 " r"\udc80"),
    ({"LC_ALL": "C"}, "utf-8", "a \x80 é € 你 😀 " r"\udc80"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii",
     r"a \x80 \xe9 \u20ac \u4f60 \U0001f600 \udc80")])
def test_what_an_encoding_lacks_is_written_as_escapes(env, encoding, escaped, stream):
    code = f"import sys; from flatgpt import signals; signals.prepare_streams(); print({TEXT!a}, file=sys.{stream})"
    done = python(code, env=env)
    assert getattr(done, stream).decode(encoding) == escaped + "\n"
    assert done.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_no_file_and_no_child_gets_the_place_of_a_closed_stream(closed, tmp_path):
    code = """
from flatgpt import signals
import subprocess
import sys
signals.prepare_streams()
with open(sys.argv[1], "w") as file:
    print("out", flush=True)
    print("err", file=sys.stderr)
    print(file.fileno() > 2, repr(sys.stdin.read()), file=file)
    echo = subprocess.run("echo child; echo child >&2; cat", shell=True)
    print(echo.returncode, file=file)
"""
    done = python(code, str(tmp_path / "file"), shell=closed)
    assert (tmp_path / "file").read_text() == "True ''\n0\n"
    assert done.stdout == (b"" if " >" in f" {closed}" else b"out\nchild\n")
    assert done.stderr == (b"" if "2>" in closed else b"err\nchild\n")
    assert done.returncode == 0


def test_other_peoples_streams_are_left_alone(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):  # a notebook's
        monkeypatch.setattr(sys, name, io.StringIO())
    before = sys.stdin, sys.stdout, sys.stderr
    signals.prepare_streams(needs_reader=True)
    assert before == (sys.stdin, sys.stdout, sys.stderr)


@pytest.mark.parametrize("flush", ["flush", "no"])
@pytest.mark.parametrize(("needed", "code"), [("needed", 1), ("no", 0)])
def test_a_reader_that_has_left_ends_only_what_was_for_it(left, needed, code, flush):
    done = python(SCRIPT, needed, flush, stdout=left)
    assert (done.returncode, done.stderr) == (code, b"")


def test_errors_without_a_reader_do_not_change_the_exit_status(left):
    code = ("from flatgpt import options, signals; signals.begin()\n"
            "def main(argv): raise OSError('x')\noptions.run_script(main)")
    assert python(code, stderr=left).returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flush", ["flush", "no"])
@pytest.mark.parametrize("needed", ["needed", "no"])
def test_a_full_disk_is_an_error_in_one_line_where_the_output_is_the_work(needed, flush):
    done = python(SCRIPT, needed, flush, shell="> /dev/full")
    line = f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'standard output'\n"
    assert (done.returncode, done.stderr.decode()) == ((2, line) if needed == "needed" else (0, ""))


def test_only_the_first_loss_is_raised(left):
    with open(left, "wb", buffering=0, closefd=False) as raw:
        output = signals._Output(io.TextIOWrapper(raw), is_needed=True)
        with pytest.raises(BrokenPipeError, match="standard output"):
            output.write(b"lost")
        assert [output.write(b"lost too") for _ in range(2)] == [8, 8]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_every_line(unbuffered):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = ("import sys; from flatgpt import signals; signals.prepare_streams(needs_reader=True)\n"
            "for i in range(3): print(str(i) * 100_000)\nsys.stdout.flush()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as child:
        os.close(writer)
        with open(reader, "rb") as file:
            lines = file.read().split()
        assert child.stderr.read() == b""
    assert child.returncode == 0
    assert lines == [b"0" * 100_000, b"1" * 100_000, b"2" * 100_000]


def test_a_run_that_nobody_can_read_trains_to_its_end(cli, tmp_path, left):
    (tmp_path / "tiny.txt").write_text("Ünïcödé 你好 😀\n" * 300)
    assert cli("prepare_data", "--input=tiny.txt", "--name=tiny", "--tokenizer=byte").code == 0
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(ROOT / "train.py"), *TINY_RUN,
               "--sample_interval=2", "--sample_tokens=30"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, stderr=left, timeout=120,
                          check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "tiny" / "checkpoints" / "step_00000006" / "SHA256SUMS").is_file()


def test_a_conversation_without_an_input_ends(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, str(ROOT / "sample.py"),
                           "--out_dir=out/tiny", "--interactive"], capture_output=True, text=True, timeout=120,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_script_may_open_as_many_files_as_the_system_lets_it():
    code = ("import resource; from flatgpt import signals; signals.begin(); "
            "print(*resource.getrlimit(resource.RLIMIT_NOFILE))")
    done = subprocess.run(["sh", "-c", f"ulimit -Sn 64; exec '{sys.executable}' -c '{code}'"], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    soft, hard = map(int, done.stdout.split())
    assert soft == (min(hard, signals.MAX_OPEN_FILES) if hard > 0 else signals.MAX_OPEN_FILES)
