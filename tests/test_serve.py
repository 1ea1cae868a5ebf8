"""serve.py: one line says where the page is, or what is missing."""

import builtins
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from conftest import ROOT, write_run

import serve
from flatgpt.options import check_options


@pytest.mark.parametrize(("options", "words"), [
    (["--host=0.0.0.0"], "host=0.0.0.0 can be reached from other machines"),
    (["--host=::"], "add --token=SECRET"),
    (["--host=example.org"], "add --token=SECRET"),
    (["--token=short"], "token must be 16 or more letters and digits"),
    (["--token=white space in a token"], "token must be 16 or more letters and digits"),
    (["--device=tpu"], "device='tpu' is not a device: use cuda, cuda:N, mps, cpu or auto"),
    (["--port=70000"], "port=70000 must be between 0 and 65535"),
    (["--prot=80"], "did you mean 'port'?")])
def test_what_cannot_be_is_one_line(refused, options, words):
    assert words in refused("serve", *options)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_token(host):
    check_options(serve.ServeConfig(host=host))


def test_without_the_web_packages_one_line_says_what_to_install(refused, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "the page needs uvicorn, which is not installed: pip install" in refused("serve")


def test_a_port_that_is_taken_is_one_line(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in refused("serve", f"--port={port}")
    assert "cannot listen at no.such.host.invalid" in refused(
        "serve", "--host=no.such.host.invalid", "--token=0123456789abcdef")


def test_the_link_has_the_token_and_a_name_that_others_reach():
    assert serve.page_url("127.0.0.1", 8000, "") == "http://127.0.0.1:8000/"
    assert serve.page_url("::1", 8000, "") == "http://[::1]:8000/"
    assert serve.page_url("0.0.0.0", 80, "secret") == f"http://{socket.gethostname()}:80/?token=secret"


def test_the_script_serves_without_torch_until_it_is_interrupted(tmp_path):
    write_run(tmp_path / "out" / "a", [{"step": 1, "train/loss": 1.0}])
    code = (f"import sys; sys.argv = ['serve.py', '--port=0']; sys.path.insert(0, {str(ROOT)!r}); import serve; "
            "serve.run_script(serve.main); print('torch' in sys.modules)")
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as server:
        line = server.stdout.readline()
        url = line.split()[0]
        assert line == f"{url} shows the runs under out; Ctrl-C ends the server\n"
        with urllib.request.urlopen(f"{url}api/events?runs=") as stream:
            assert stream.readline() == b"retry: 2000\n"
            server.send_signal(signal.SIGINT)  # with a stream open
            out, err = server.communicate(timeout=30)
    assert (server.returncode, out, err) == (0, "False\n", "")
