"""A server and curl lines as the docs have them: in this process, or by the program that README_PROGRAM names."""

import contextlib
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .serving import run_serve

PROGRAM = Path(name).absolute() if (name := os.environ.get("README_PROGRAM")) else None


def ask(curl):
    """Sends the request of a curl line, with curl if it is installed; waits for the server."""
    if shutil.which("curl"):
        retry = ["--silent", "--noproxy", "*", "--retry", "60", "--retry-delay", "1", "--retry-connrefused"]
        return subprocess.run([*curl, *retry], capture_output=True, text=True, check=True, timeout=120).stdout
    command, url, header_flag, header, data_flag, data = curl
    assert (command, header_flag, data_flag) == ("curl", "-H", "-d")
    request = urllib.request.Request(url, data.encode(), dict([header.split(": ")]))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(60):
        try:
            return opener.open(request, timeout=60).read()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:  # the server does not listen yet
            time.sleep(1)
    raise AssertionError("the server did not answer")


@contextlib.contextmanager
def serving(words, monkeypatch):
    if PROGRAM:
        with subprocess.Popen([PROGRAM, *words[1:]]) as process:
            try:
                yield
            finally:
                process.terminate()
        return
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with run_serve(words, monkeypatch):
        yield
