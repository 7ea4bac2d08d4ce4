"""Where the page listens: checked before anything is loaded, and said as others can type it."""

from __future__ import annotations

import errno
import ipaddress
import socket

from ldm.errors import InputError, shown
from ldm.web.guard import LOOPBACK

FIRST_PORT, N_PORTS = 7860, 100
ANYWHERE = ("0.0.0.0", "::")


def free_port(host: str, port: int | None) -> int:
    """A port to listen at: the one that is wanted, or the first free one from 7860 on.

    Raises:
        InputError: this machine has no such address, or the port cannot be had.
    """
    ports = range(FIRST_PORT, FIRST_PORT + N_PORTS) if port is None else (port,)
    for one in ports:
        try:
            listener(host, one).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            if error.errno == errno.EACCES:
                raise InputError(f"--port {one}: this user may not listen there") from None
            raise InputError(
                f"--host {shown(host)}: this machine has no such address; 127.0.0.1 is for this "
                "machine alone, 0.0.0.0 for everybody who can reach it"
            ) from None
        except UnicodeError:
            raise InputError(f"--host {shown(host)}: not a name of a machine") from None
        return one
    where = f"--port {port}" if port is not None else f"ports {FIRST_PORT} to {ports[-1]}"
    raise InputError(f"{where}: in use already at {host}; choose another with --port")


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: the address cannot be had.
    """
    name = host.removeprefix("[").removesuffix("]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError:
        found.close()
        raise
    return found


def own_names(host: str, allowed: list[str]) -> tuple[str, ...]:
    """Names under which the page may be asked, besides numbers.

    Args:
        host: where it listens.
        allowed: further ones that the user gives.
    """
    names = [*LOOPBACK, *allowed]
    if host not in LOOPBACK:
        own = socket.gethostname()
        names += [own, f"{own}.local", socket.getfqdn()]
        if host not in ANYWHERE:
            names.append(host)
    return tuple(name for name in dict.fromkeys(names) if name)


def lan_address() -> str | None:
    """This machine's number as others on its network see it; nothing is sent to find out."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # a number that is nobody's
            found = probe.getsockname()[0]
    except OSError:
        return None
    return None if ipaddress.ip_address(found).is_loopback else found
