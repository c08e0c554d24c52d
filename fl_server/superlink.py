"""The coordinator's processes: the exact stock commands, and the configuration of the public port."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fl_server.home import Home, read_home
from fl_server.supervise import Child, supervise
from icmoe.atomic import write_atomically
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, printable
from icmoe.joining import split_address
from icmoe.processes import flower_environment, flower_settings, private_files, program

# What a SuperNode with a registered key asks for; register-node and unregister-node are for nodes without one.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)


def superlink_command(home: Home) -> list[str]:
    """Return `flower-superlink` as this consortium needs it."""
    options = {
        "--host": "127.0.0.1",
        "--port": str(home.superlink_port),
        "--ssl-ca-certfile": str(home.ca),
        "--ssl-certfile": str(home.certificate),
        "--ssl-keyfile": str(home.key),
        "--database": str(home.database),
        "--isolation": "process",
        "--superexec-auth-secret-file": str(home.secret),
    }
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    return [program("flower-superlink"), *(word for option in options.items() for word in option), *flags]


def superexec_command(home: Home) -> list[str]:
    """Return `flower-superexec`, which starts the ServerApps; it installs nothing unless told to."""
    options = {
        "--runtime-api-address": home.superlink,
        "--root-certificates": str(home.ca),
        "--superexec-auth-secret-file": str(home.secret),
    }
    return [program("flower-superexec"), *(word for option in options.items() for word in option)]


def printed(home: Home) -> str:
    """Return the commands as a shell would take them."""
    settings = [f"export {name}={shlex.quote(value)}" for name, value in flower_settings(home.flower, os.environ).items()]
    path = f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"'
    commands = [shlex.join(superlink_command(home)) + " &", shlex.join(superexec_command(home)) + " &"]
    proxy = [f"# the public port, {home.address}:", _proxy_command(home)]
    return "\n".join(["umask 077", *settings, path, *commands, *proxy]) + "\n"


def _proxy_command(home: Home) -> str:
    return shlex.join(["nginx", "-e", "stderr", "-c", str(home.proxy / "nginx.conf")])


def children(home: Home) -> list[Child]:
    """Return both programs, to be supervised."""
    environment = flower_environment(home.flower, os.environ)
    commands = {"flower-superlink": superlink_command(home), "flower-superexec": superexec_command(home)}
    return [Child(name, command, environment) for name, command in commands.items()]


def require_free_port(port: int) -> None:
    """Refuse a loopback port that something listens on already.

    Raises
    ------
    IcmoeError
        329.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise IcmoeError(Fault(number=329, value=f"127.0.0.1:{port}", did=NOT_STARTED)) from None


def require_listen(listen: str) -> None:
    """Refuse what nginx could not listen on.

    Raises
    ------
    IcmoeError
        202.
    """
    try:
        host, _ = split_address(listen)
        if "[" in listen or host.replace(".", "").isdigit():
            ipaddress.ip_address(host)
    except ValueError:
        limit, did = "ADDRESS:PORT, for example 0.0.0.0:8443 or [::]:8443", "Nothing was written or started."
        raise IcmoeError(Fault(number=202, where="--listen", value=listen, limit=limit, did=did)) from None


def nginx_configuration(home: Home, *, listen: str | None = None) -> str:
    """Return the configuration of the public port.

    Parameters
    ----------
    home
        The coordinator's folder.
    listen
        Address and port to listen on; all addresses and the public port where absent.
    """
    text = files("fl_server").joinpath("nginx.conf.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True).from_string(text)  # noqa: S701
    paths = {"proxy": home.proxy, "certificate": home.certificate, "key": home.key, "ca": home.ca}
    return template.render(
        {name: in_quotes(path) for name, path in paths.items()},
        command=_proxy_command(home),
        listen=listen or str(home.public_port),
        superlink_port=home.superlink_port,
        calls="|".join(FLEET_CALLS),
    )


def in_quotes(path: Path) -> str:
    """Return a path as it stands between nginx's double quotes.

    Raises
    ------
    IcmoeError
        202 where nginx has no way to write it down: it takes a dollar sign for a variable.
    """
    text = str(path)
    if "$" in text or not text.isprintable():
        limit = "no dollar sign or unprintable character"
        raise IcmoeError(Fault(number=202, where="--home", value=printable(text), limit=limit, did=NOT_STARTED))
    return text.replace("\\", r"\\").replace('"', r"\"")


def write_configurations(home: Home, *, listen: str | None = None) -> None:
    """Write nginx.conf and Flower's connection into the coordinator's folder."""
    (home.proxy / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(home.proxy / "nginx.conf", nginx_configuration(home, listen=listen).encode())
    home.write_flower_configuration()


def serve(root: Path, *, execute: bool, listen: str | None) -> None:
    """Write the configurations and print the commands, or run and supervise them.

    Raises
    ------
    IcmoeError
        202 for `listen`, those of `read_home` for the folder, 329 where the loopback port is in use.
    """
    if listen is not None:
        require_listen(listen)
    home = read_home(root)
    write_configurations(home, listen=listen)
    if not execute:
        sys.stdout.write(printed(home))
        return
    require_free_port(home.superlink_port)
    with private_files():
        sys.stderr.write(printed(home))
        supervise(children(home))
