"""A python that has its libraries loaded: every command is a process of its own without seconds of imports.

`python()` is a stand-in for `sys.executable`. It hands arguments, directory, environment and standard streams to a
server, which forks. The server has loaded other people's libraries only: the project's modules are those that a command
finds. Signals and exit codes are those of the process. What no program can catch (SIGSTOP), resource limits, and what
libraries read from the environment when they are loaded (HF_ENDPOINT) do not reach it: use `sys.executable` there.
"""

import atexit
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

LIBRARIES = (
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils", "transformers.tokenization_utils_fast", "datasets", "evaluate", "hydra.main",
    "omegaconf", "safetensors.torch", "scipy.stats", "sklearn.metrics", "pandas", "peft", "accelerate",
)  # fmt: skip
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps(request).encode() + b"\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
code = int(server.makefile().read())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def python() -> str:
    """Start the server of this process, once; returns the stand-in's path."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    address, stand_in = Path(folder, "socket"), Path(folder, "python")
    stand_in.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    stand_in.chmod(0o755)
    command = [sys.executable, __file__, str(address), str(stand_in), *LIBRARIES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # it ends when its standard input does, and so with this process
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.communicate)
    return str(stand_in)


def requests(address: str) -> tuple[dict, list[int]]:
    """Wait for requests; returns in a fork for each of them: what is asked, and the three streams."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who report
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            os._exit(0)
        connection = listening.accept()[0]
        if os.fork():
            connection.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile() as lines:
            asked = json.loads(lines.readline())
        worker = os.fork()
        if not worker:
            connection.close()
            return asked, streams
        for stream in streams:
            os.close(stream)
        watch(worker, connection)
        os._exit(0)


def watch(worker: int, connection: socket.socket) -> None:
    """Pass signals on to the worker, end it with the one who asked, and report its exit code."""
    while not (ended := os.waitpid(worker, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.01)[0]:
            numbers = connection.recv(16)
            for number in numbers or [signal.SIGKILL]:
                os.kill(worker, number)
            if not numbers:
                os.waitpid(worker, 0)
                return
    connection.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())


def run(asked: dict, streams: list[int]) -> None:
    """What `python ARGUMENTS` does."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[0:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = [argument for argument in asked["arguments"] if argument != "-u"]
    if first == "-m":
        sys.path.insert(0, asked["folder"])
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-", "-c"):
        sys.path.insert(0, "")
        code = sys.stdin.read() if first == "-" else rest.pop(0)
        sys.argv = [first, *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def end(code: object) -> None:
    """Leave as python does, without the second that it takes to take all modules apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code) if isinstance(code, int) else int(code is not None))


def main(address: str, stand_in: str, *libraries: str) -> None:
    for library in libraries:
        __import__(library)
    asked, streams = requests(address)
    sys.executable = stand_in
    try:
        run(asked, streams)
    except SystemExit as stop:
        end(stop.code)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        end(1)
    end(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
