"""Where this machine listens, found out before a model is loaded."""

import socket

from ..errors import ServerError

HOST = "127.0.0.1"


def check_port(host: str, port: int) -> None:
    """Raises ServerError if nothing can listen there; a web server would find out only after the model is loaded."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"{host}:{port}: cannot be listened on: {error.strerror}; give another port (--port)"
            ) from error
