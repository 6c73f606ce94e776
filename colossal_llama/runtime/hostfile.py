"""Checks a hostfile before ``colossalai run`` reads it: one host a line, nothing else.

What ``colossalai run`` 0.5.0 does by itself: a blank line is passed over; an empty file trains
on this machine alone; a missing file or a host that is there twice ends it with exit code 0 and
nothing trained; a comment, ``host slots=8`` or a name that does not resolve is a traceback; a
machine that is there under two names is started twice; a host that asks for a password hangs.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from colossal_llama.errors import UsageError

Result = TypeVar("Result")

# RFC 1123, and the underscore that many clusters use all the same.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?")
# Host checks are nothing but waiting.
_AT_ONCE = 64
# Seconds to wait for the connection, and for what runs over it.
SSH_TIMEOUT = 10
# What the command that runs over ssh says by its exit code; 255 is ssh's own.
_NO_DIRECTORY, _NO_TORCHRUN = 41, 42


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    where: str  # file:line


def check_hostfile(path: Path, *, ssh: bool = True, ssh_port: int | None = None) -> str:
    """Returns what was found good, in one line.

    Args:
        ssh: whether to log in to every host that is not this machine, as the launcher will.
        ssh_port: the port for that, as ``colossalai run --ssh-port``.

    Raises:
        UsageError: every problem of the first kind that there is: format, names, logins.
    """
    hosts = read_hostfile(path)
    addresses = resolve(hosts)
    remote = [host for host in hosts if not is_local(host, addresses[host])]
    found = f"{path}: {_count(len(hosts), 'host')}, {len(hosts) - len(remote)} of them this machine"
    if not remote or not ssh:
        return found
    if shutil.which("ssh") is None:
        return f"{found}; there is no ssh here to try the others with"
    answers = _each(lambda host: _log_in(host, ssh_port), remote)
    if any(answers):
        raise UsageError([answer for answer in answers if answer])
    return f"{found}; ssh works on the {_count(len(remote), 'other')}"


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in the order of the file.

    Raises:
        UsageError: naming every line that is not one host, or a host that was there before.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError([f"{path}: {error.strerror}; write one host a line into it"]) from None
    except UnicodeDecodeError:
        raise UsageError([f"{path}: not text in UTF-8; write one host a line into it"]) from None
    if not lines:
        raise UsageError([f"{path}: names no host; write one host a line into it"])
    hosts: list[Host] = []
    seen: dict[str, int] = {}
    problems = []
    alone = len({line.strip() for line in lines} - {""}) == 1
    for number, line in enumerate(lines, 1):
        host = Host(line.strip(), f"{path}:{number}")
        problem = _problem(host.name, alone=alone)
        key = host.name.lower().rstrip(".")
        if problem is None and key in seen:
            problem = f"{host.name} is in line {seen[key]} already; remove one of the two lines"
        if problem is not None:
            problems.append(f"{host.where}: {problem}")
            continue
        seen[key] = number
        hosts.append(host)
    if problems:
        raise UsageError(problems)
    return hosts


def _problem(text: str, *, alone: bool) -> str | None:
    """Why a line is not one host (``alone``: its file names no other); None if it is."""
    if not text:
        return "blank line; remove it"
    if text.startswith("#"):
        return "comments are not understood by colossalai run; remove the line"
    if len(text.split()) > 1 or "," in text:
        return (
            f"{text!r}: one host a line and nothing after it; the processes of a host "
            "are --nproc_per_node"
        )
    if "@" in text:
        return f"{text!r}: a user name goes into ~/.ssh/config (Host, User), not here"
    if text.startswith("[") or re.fullmatch(r"[^:]+:\d+", text):
        return f"{text!r}: a port is given to colossalai run as --ssh-port, not here"
    if not _is_address(text) and not _NAME.fullmatch(text):
        return f"{text!r} is not a host name or an address; write the name that ssh takes"
    if _is_loopback(text) and not alone:
        return f"{text} is another machine on every host; write the name the others know it by"
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    if _is_address(text):
        address = ipaddress.ip_address(text)
        return address.is_loopback or address.is_unspecified
    return text.lower() == "localhost"


def resolve(hosts: list[Host]) -> dict[Host, frozenset[str]]:
    """The addresses of every host.

    Raises:
        UsageError: naming every host that has none, or the address of another line.
    """
    found = dict(zip(hosts, _each(lambda host: _addresses(host.name), hosts), strict=True))
    problems = [
        f"{host.where}: {host.name} does not resolve; correct the name or add it to /etc/hosts"
        for host in hosts
        if not found[host]
    ]
    first: dict[str, Host] = {}
    for host in hosts:
        for address in sorted(found[host]):
            other = first.setdefault(address, host)
            if other is not host:
                problems.append(
                    f"{host.where}: {host.name} is the same machine ({address}) as {other.name} "
                    f"of line {other.where.rpartition(':')[2]}; remove one of the two lines"
                )
                break
    if problems:
        raise UsageError(problems)
    return found


def _addresses(name: str) -> frozenset[str]:
    try:
        return frozenset(str(entry[4][0]) for entry in socket.getaddrinfo(name, None))
    except OSError:
        return frozenset()


def is_local(host: Host, addresses: frozenset[str]) -> bool:
    """Whether ``colossalai run`` starts this host's processes without ssh."""
    if host.name in ("localhost", "127.0.0.1", "0.0.0.0"):
        return True
    return addresses == _addresses(socket.gethostname())


def _log_in(host: Host, port: int | None) -> str | None:
    """Logs in and looks for this directory and torchrun; returns what is wrong."""
    directory, torchrun = os.getcwd(), shutil.which("torchrun")
    command = f"cd {shlex.quote(directory)} || exit {_NO_DIRECTORY}"
    if torchrun is not None:
        command += f"; test -x {shlex.quote(torchrun)} || exit {_NO_TORCHRUN}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT}"]
    options += [] if port is None else ["-p", str(port)]
    by_hand = f"ssh {'' if port is None else f'-p {port} '}{host.name} true"
    remedy = f"{by_hand} has to work without a question"
    try:
        done = subprocess.run(
            ["ssh", *options, host.name, command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * SSH_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{host.where}: {host.name} does not answer within {2 * SSH_TIMEOUT} s; {remedy}"
    if done.returncode == _NO_DIRECTORY:
        return f"{host.where}: {host.name} has no {directory}; put the repository there, too"
    if done.returncode == _NO_TORCHRUN:
        return f"{host.where}: {host.name} has no {torchrun}; put the environment there, too"
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"{host.where}: {host.name}: {said}; {remedy}"
    return None


def _each(function: Callable[[Host], Result], hosts: list[Host]) -> list[Result]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, hosts))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
