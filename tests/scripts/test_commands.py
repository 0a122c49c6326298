"""The commands end in one sentence, whatever goes wrong."""

import errno
import urllib.error

import pytest

from dit_toolkit.scripts import demo, server, setup
from dit_toolkit.scripts.client import PromptFailed, PromptInterrupted, PromptRefused
from dit_toolkit.scripts.server import ServerError

FAILED = {"node_id": 3, "node_type": "KSampler", "exception_message": "out of memory"}
REFUSED = {"error": {"message": "Prompt has no outputs"}}
LOG = "demo/server.log"

# The demo


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ServerError("Port 8188 is in use."), ["Port 8188 is in use."]),
        (PromptFailed(FAILED), ["node 3 (KSampler)", "out of memory", LOG]),
        (PromptRefused(REFUSED), ["refused", "Prompt has no outputs", LOG]),
        (PromptInterrupted("interrupted at node 3"), ["stopped from elsewhere"]),
        (TimeoutError("not finished after 600 s"), ["too long", LOG]),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), ["stopped in the middle", LOG]),
        (ConnectionError("the other side closed the websocket"), ["stopped in the middle", LOG]),
        (OSError(errno.ENOSPC, "No space left on device", "output/01.png"), ["The disk is full."]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.json"), ["gone.json"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_demo_that_fails_says_why(error, said, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo", raising(error))
    assert demo.main([]) == 1
    text = capsys.readouterr().err
    assert all(part in text for part in said), text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1


def test_a_demo_can_be_stopped(monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo", raising(KeyboardInterrupt()))
    assert demo.main([]) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_fault_of_the_demo_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "demo", raising(KeyError("a fault")))
    with pytest.raises(KeyError):
        demo.main([])


def raising(error: BaseException):
    def fail():
        raise error

    return fail


# Arguments


@pytest.mark.parametrize("port", ["abc", "", "0", "-1", "65536", "8188.5", "²"])
def test_serve_refuses_a_port_that_is_none(port, capsys):
    assert server.main([port]) == 1
    assert f"PORT must be a number from 1 to 65535, not '{port}'." in capsys.readouterr().err


# Set-up


@pytest.mark.parametrize(
    ("working", "expected"),
    [
        (["-m pip", "pip3", "-m venv"], "-m pip"),
        (["pip3", "-m venv"], "pip3"),
        (["-m venv"], "pip/bin/python -m pip"),
    ],
    ids=["own pip", "pip3 on PATH", "virtual environment"],
)
def test_set_up_finds_a_pip(working, expected, monkeypatch):
    monkeypatch.setattr(setup, "works", lambda command: any(part in joined(command) for part in working))
    monkeypatch.setattr(setup, "apt", raising(AssertionError("nothing is to be installed")))
    assert joined(setup.pip()).endswith(expected)


def test_set_up_installs_pip_on_debian_as_root(monkeypatch, tmp_path):
    installed = []
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    monkeypatch.setattr(setup, "works", lambda command: "-m pip" in joined(command) and bool(installed))
    monkeypatch.setattr(setup, "may_apt", lambda: True)
    monkeypatch.setattr(setup, "apt", installed.append)
    assert joined(setup.pip()).endswith("-m pip")
    assert installed == ["python3-pip"]


def test_set_up_says_what_to_install_where_there_is_no_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    monkeypatch.setattr(setup, "works", lambda command: False)
    monkeypatch.setattr(setup, "may_apt", lambda: False)
    with pytest.raises(setup.SetupError, match="apt-get install python3-pip"):
        setup.pip()


def test_set_up_makes_a_half_made_environment_again(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "python", lambda: tmp_path / "bin" / "python")
    monkeypatch.setattr(setup, "uv", lambda: "uv")
    monkeypatch.setattr(setup, "DISK_NEEDED", 0)
    monkeypatch.setattr(setup, "run", lambda command, failure: commands.append(joined(command)))
    setup.packages()
    assert "venv" in commands[0]
    assert "--clear" in commands[0]


def joined(command: list) -> str:
    return " ".join(str(part) for part in command)
