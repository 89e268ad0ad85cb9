"""The address that a server listens on: checked before a model is loaded, and printed as a URL."""

import socket

from ..errors import ServerError

HOST = "127.0.0.1"


def check_port(host: str, port: int) -> None:
    """Raises ServerError if the port is not free, which a web server would find out only after loading the model."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # or "::" would be IPv4's addresses too
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(address)
    except OSError as error:
        where = format_address(host, port)
        raise ServerError(f"{where}: cannot be listened on: {error.strerror}; give another port (--port)") from error


def format_address(host: str, port: int) -> str:
    """Returns host:port as a URL has it, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
