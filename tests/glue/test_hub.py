"""The hub is asked once, with patience of seconds, and its absence is said in two lines."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from increlora.errors import UserError
from increlora.glue import hub

INSTEAD = "backbone.path=DIR"


@pytest.fixture(autouse=True)
def forget():
    hub._trouble.cache_clear()
    yield
    hub._trouble.cache_clear()


@pytest.fixture
def server():
    """A hub that answers every request with `server.code` and counts them."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.count += 1
            self.send_response(self.server.code)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.code, server.count = 200, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def use(monkeypatch, endpoint, offline=False):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def message_of(instead=INSTEAD):
    with pytest.raises(UserError) as raised:
        hub.require_hub(instead)
    return str(raised.value)


@pytest.mark.parametrize("code", [200, 401, 404])
def test_a_hub_that_answers_is_enough(monkeypatch, server, code):
    server.code = code
    use(monkeypatch, address(server))
    hub.require_hub(INSTEAD)


def test_it_is_asked_once_per_process(monkeypatch, server):
    use(monkeypatch, address(server))
    for _ in range(3):
        hub.require_hub(INSTEAD)
    assert server.count == 1


def test_a_broken_hub_is_no_hub(monkeypatch, server):
    server.code = 503
    use(monkeypatch, address(server))
    assert "503" in message_of()


def test_absence_is_remembered_and_said_in_two_lines(monkeypatch):
    use(monkeypatch, closed_port())
    start = time.monotonic()
    message = message_of()
    assert time.monotonic() - start < 40  # the hub's own clients would retry for 48 s
    assert message.count("\n") <= 1
    assert INSTEAD in message and "make quickstart" in message and constants.ENDPOINT in message
    monkeypatch.setattr(hub, "_ask", lambda endpoint: pytest.fail("asked again"))
    assert "task.data_dir=DIR" in message_of("task.data_dir=DIR")


def test_a_name_server_that_hangs_does_not_hold_us(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    answered = threading.Event()

    def hang(*args, **kwargs):
        answered.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    use(monkeypatch, "https://hub.invalid")
    began = time.monotonic()
    assert "no answer within 0.2 s" in message_of()
    assert time.monotonic() - began < 10  # we did not wait for it
    answered.set()


def test_offline_mode_asks_nobody(monkeypatch):
    use(monkeypatch, "https://hub.invalid", offline=True)
    monkeypatch.setattr(hub, "_ask", lambda endpoint: pytest.fail("asked"))
    assert "HF_HUB_OFFLINE" in message_of()


@pytest.mark.parametrize("endpoint", ["nonsense", "https://[", ""])
def test_an_endpoint_that_is_no_address(monkeypatch, endpoint):
    use(monkeypatch, endpoint)
    assert INSTEAD in message_of()
