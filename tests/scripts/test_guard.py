"""The guard of every command: errors in two lines, and no traceback where the reader of the output leaves."""

import ast
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = {  # script -> whether it ends when nobody reads; a sweep goes on
    "describe.py": (True, ["method=lora", "backbone=tiny", "task=synthetic_entailment"]),
    "sweep.py": (False, ["seeds", "--dry-run"]),
}
TALKATIVE = """
import sys
from increlora.glue import config

@config.guarded
def main():
    print("a line\\n" * int(sys.argv[1]))
    if sys.argv[2:]:
        raise BrokenPipeError("of something else")

main()
"""


def read_by_nobody(*command: object) -> tuple[int, str]:
    """Exit code and messages of a command whose output nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run([sys.executable, *map(str, command)], stdout=pipe, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_is_guarded(path):
    (main,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "main")
    assert any(ast.unparse(decorator).rpartition(".")[2] == "guarded" for decorator in main.decorator_list)


@pytest.mark.parametrize("lines", [1, 100_000], ids=["in one piece", "in many pieces"])
def test_a_reader_that_left_ends_a_command_without_a_word(lines):
    assert read_by_nobody("-c", TALKATIVE, lines) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_no_reader_that_left():
    done = subprocess.run([sys.executable, "-c", TALKATIVE, "1", "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: of something else" in done.stderr


def told(*command: object, **options) -> tuple[int, str]:
    """Exit code and messages of a Python command."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    return done.returncode, done.stderr


def test_what_the_system_refuses_is_told_in_one_line():
    said = told("-c", TALKATIVE.replace('print("a line', 'open("x" * 300); print("a line'), 1)
    assert said == (2, f"error: cannot use {'x' * 200}... (300 characters): File name too long\n")


def test_an_interpreter_without_docstrings_is_refused():
    assert told("-OO", "-c", TALKATIVE, 1) == (
        2, "error: python -OO removes docstrings, which transformers needs; leave -OO out\n",
    )  # fmt: skip


def test_a_closed_output_is_no_error():
    assert told("-c", f"import sys\nsys.stdout = None\n{TALKATIVE}", 1) == (0, "")


@pytest.mark.parametrize("script", COMMANDS)
def test_real_commands_do_so(script):
    ends, arguments = COMMANDS[script]
    code, said = read_by_nobody(ROOT / "scripts" / script, *arguments)
    assert bool(code) == ends and said == ""
