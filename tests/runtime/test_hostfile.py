"""A hostfile that cannot be used as it is: refused before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossal_llama import cli
from colossal_llama.errors import UsageError
from colossal_llama.runtime import hostfile
from colossal_llama.runtime.hostfile import check_hostfile, read_hostfile

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node-1\nnode_2.cluster\n", ["node-1", "node_2.cluster"]),
        ("node1\nnode2", ["node1", "node2"]),
        ("node1  \r\n\tnode2\r\n", ["node1", "node2"]),  # colossalai run strips these
        ("10.0.0.1\nfe80::1\n", ["10.0.0.1", "fe80::1"]),
        ("127.0.0.1\n", ["127.0.0.1"]),
    ],
)
def test_good_files(tmp_path: Path, text: str, names: list[str]) -> None:
    hosts = read_hostfile(write(tmp_path, text))
    assert [host.name for host in hosts] == names
    assert hosts[-1].where == f"{tmp_path / 'hostfile'}:{len(names)}"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a\n\nb\n", 2, "blank line; remove it"),
        ("a\nb\n\n", 3, "blank line; remove it"),
        ("127.0.0.1\n  \n", 2, "blank line; remove it"),
        ("a\nb\na\n", 3, "a is in line 1 already; remove one of the two lines"),
        ("a\nA.\n", 2, "A. is in line 1 already"),
        ("127.0.0.1\n127.0.0.1\n", 2, "127.0.0.1 is in line 1 already"),
        ("# my hosts\na\n", 1, "comments are not understood by colossalai run; remove the line"),
        ("a slots=8\n", 1, "'a slots=8': one host a line and nothing after it"),
        ("a,b\n", 1, "'a,b': one host a line and nothing after it"),
        ("me@a\n", 1, "'me@a': a user name goes into ~/.ssh/config"),
        ("a:22\n", 1, "'a:22': a port is given to colossalai run as --ssh-port, not here"),
        ("[::1]:22\n", 1, "a port is given to colossalai run as --ssh-port, not here"),
        ("-oProxyCommand=x\n", 1, "'-oProxyCommand=x' is not a host name or an address"),
        ("\ufeffa\nb\n", 1, "is not a host name or an address"),
        ("a\nlocalhost\n", 2, "localhost is another machine on every host"),
        ("127.0.0.2\na\n", 1, "127.0.0.2 is another machine on every host"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_hostfile(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:{line}: ")
    assert words in problem


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_hostfile(write(tmp_path, "a\n\na\nb c\n"))
    assert [problem.split(": ")[0][-2:] for problem in caught.value.problems] == [":2", ":3", ":4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory; write one host a line into it"),
        (b"", "names no host"),
        (b"\xff\xfe", "not text in UTF-8"),
    ],
)
def test_no_file_no_hosts_no_text(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "hostfile"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_hostfile(path)


def test_names_have_to_resolve_to_different_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"a": {"10.0.0.1"}, "a.cluster": {"10.0.0.1", "10.1.0.1"}, "b": {"10.0.0.2"}}
    monkeypatch.setattr(hostfile, "_addresses", lambda name: frozenset(known.get(name, ())))
    with pytest.raises(UsageError) as caught:
        check_hostfile(write(tmp_path, "a\nb\nnowhere\na.cluster\n"), ssh=False)
    assert [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems] == [
        "hostfile:3: nowhere does not resolve; correct the name or add it to /etc/hosts",
        "hostfile:4: a.cluster is the same machine (10.0.0.1) as a of line 1; "
        "remove one of the two lines",
    ]


def pretend_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An ``ssh`` that does as ``script`` says; its last two arguments are $host and $command."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/bash\nhost="${{@: -2:1}}" command="${{@: -1}}"\n{script}\n')
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{BIN}:{os.environ['PATH']}")


# Numbers of TEST-NET-1: they resolve to themselves and belong to nobody.
REMOTE = "192.0.2.1\n192.0.2.2\n"


def test_every_other_host_is_logged_in_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ssh(tmp_path, monkeypatch, f'echo "$*" >> {tmp_path}/calls; bash -c "$command"')
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, REMOTE)
    found = f"{path}: 2 hosts, 0 of them this machine; ssh works on the 2 others"
    assert check_hostfile(path, ssh_port=2222) == found
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2
    assert all("BatchMode=yes" in call and "-p 2222" in call for call in calls)
    # Whom colossalai run starts without ssh is not asked.
    assert check_hostfile(write(tmp_path, "127.0.0.1\n")).endswith("1 host, 1 of them this machine")
    assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo noise >&2; echo 'Permission denied (publickey).' >&2; exit 255",
         "Permission denied (publickey).; ssh 192.0.2.1 true has to work without a question"),
        ("exit 41", "has no {cwd}; put the repository there, too"),
        ("exit 42", "has no {bin}/torchrun; put the environment there, too"),
        ("sleep 60", "does not answer within 2 s"),
    ],
)  # fmt: skip
def test_a_host_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    pretend_ssh(tmp_path, monkeypatch, f'if [ "$host" = 192.0.2.2 ]; then exit 0; fi\n{script}')
    monkeypatch.setattr(hostfile, "SSH_TIMEOUT", 1)
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, REMOTE)
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        check_hostfile(path)
    assert time.monotonic() - started < 10.0
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:1: 192.0.2.1")
    assert words.format(cwd=tmp_path, bin=BIN) in problem


def test_doctor_checks_the_hostfile_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, "127.0.0.1\n")
    assert cli.main(["doctor", "--hostfile", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 1 host, 1 of them this machine\n"
    write(tmp_path, "127.0.0.1\n127.0.0.1\n")
    assert cli.main(["doctor", "--hostfile", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}:2: 127.0.0.1 is in line 1 already")
    assert said.count("\n") == 1
    assert cli.main(["doctor", "--ssh_port", "22"]) == 2


@pytest.mark.parametrize("script", ["train.example.sh", "train_sft.example.sh"])
@pytest.mark.parametrize(("text", "runs"), [("127.0.0.1\n\n", False), ("127.0.0.1\n", True)])
def test_example_scripts_ask_before_the_launch(
    tmp_path: Path, script: str, text: str, runs: bool
) -> None:
    write(tmp_path, text)
    (tmp_path / "colossalai").write_text(f"#!/bin/bash\ntouch {tmp_path}/launched\n")
    (tmp_path / "colossalai").chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / script)],
        cwd=tmp_path, env={**os.environ, "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode == 0) is runs, done.stderr
    assert (tmp_path / "launched").exists() is runs
    if not runs:
        assert done.stderr == "error: hostfile:2: blank line; remove it\n"
