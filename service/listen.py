"""The port of a server, and the error of one that cannot start."""

import errno
import socket


class ServiceError(ValueError):
    """The server cannot start: one line that says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: a port that is taken should show at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServiceError(f"cannot listen on {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        hint = "choose another port"
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "an address of this machine is needed, or 0.0.0.0 for all that it has"
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from None
    return listener
