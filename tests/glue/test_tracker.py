"""Local JSON lines are the truth; W&B offline holds the same values and may fail without harm."""

import contextlib
import http.server
import json
import logging
import socket
import struct
import threading

import pytest
import wandb

from increlora.errors import UserError
from increlora.glue.tracker import Tracker, WandbTracker
from increlora.matrices import rank_map

BLOCK = 32768
KINDS = {"query": r".*query", "value": r".*value"}
RUN = {"backbone": "tiny", "budget": "r2", "method": "increlora", "task": "rte", "seed": 41}
CONFIG = {"method": {"kinds": KINDS, "name": "increlora"}, "train": {"learning_rate": 1e-3}}
RANKS = {"layer.0.query": 1, "layer.0.value": 2, "layer.1.query": 3, "layer.1.value": 4}


@pytest.fixture(autouse=True)
def no_service_stays():
    """W&B's own process, and what it leaves in the environment, end with the test."""
    yield
    wandb.teardown()


def lines(tracker) -> list[dict]:
    return [json.loads(line) for line in tracker.path.read_text().splitlines()]


def record(tracker, folder):
    tracker.start(folder, RUN, CONFIG)
    tracker.log(1, {})  # nothing to say
    tracker.log(10, {"train/loss": 0.5, "eval/score": 0.25})
    tracker.log(20, {"train/loss": 0.4, "eval/score": 0.75, "rank/layer.0.query": 1.0}, RANKS)
    tracker.finish("finished", {"best": 0.75})


def wandb_records(file):
    """The protobuf records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # a finished run may not be on disk yet: W&B's own process writes it, and ends here
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # no room for a record's header: padding
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after four bytes of checksum
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_rank_map_by_hand():
    assert rank_map(RANKS, KINDS) == ([0, 1], ["query", "value"], [[1, 2], [3, 4]])


def test_json_lines_hold_every_value_as_it_comes(tmp_path):
    tracker = Tracker()
    tracker.start(tmp_path / "run", RUN, CONFIG)
    tracker.log(10, {"train/loss": 0.5})
    assert lines(tracker)[0]["train/loss"] == 0.5  # readable before the run ends, as after a crash
    tracker.finish("failed", {})
    assert [line.get("step") for line in lines(tracker)] == [10, None]
    assert lines(tracker)[1]["status"] == "failed"


def test_wandb_offline_run_is_read_back(tmp_path, caplog):
    tracker = WandbTracker(mode="offline", tags=["test"])
    record(tracker, tmp_path)
    assert tracker.run is not None, caplog.text
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, config, run = [], {}, None
    for item in wandb_records(file):
        kind = item.WhichOneof("record_type")
        if kind == "history":
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in item.history.item})
        elif kind == "run":
            run = item.run
            config |= {u.key: json.loads(u.value_json) for u in item.run.config.update}
    assert [row["step"] for row in history] == [10, 20]  # one call per step
    assert history[0]["train/loss"] == 0.5 and history[1]["rank/layer.0.query"] == 1.0
    assert any("rank_map" in key for key in history[1]) and not any("rank_map" in key for key in history[0])
    assert run.run_group == "rte-increlora-r2-tiny" and run.project == "increlora" and "test" in run.tags
    assert config["train"]["learning_rate"] == 1e-3 and config["run"]["seed"] == 41
    assert list((file.parent / "files" / "media").rglob("*.png")) and list(
        (file.parent / "files").rglob("*table*.json")
    )
    assert [line.get("step") for line in lines(tracker)] == [10, 20, None]
    assert any(str(file.parent) in line for line in tracker.where())
    assert any(line.startswith("to upload it later: wandb sync") for line in tracker.where())


def test_a_failing_wandb_costs_nothing_but_itself(tmp_path, caplog, monkeypatch):
    tracker = WandbTracker(mode="offline")
    tracker.start(tmp_path, RUN, CONFIG)

    def fail(*args, **kwargs):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(tracker.run, "log", fail)
    run = tracker.run
    with caplog.at_level(logging.WARNING):
        tracker.log(10, {"train/loss": 0.5})
        tracker.log(20, {"train/loss": 0.4})
    tracker.finish("finished", {})
    assert [line.get("step") for line in lines(tracker)] == [10, 20, None]
    assert caplog.text.count("disk on fire") == 1
    assert tracker.where()[1:] == ["W&B: off (see the warning above)"]
    run.finish()


def test_wandb_that_was_switched_off_warns_of_nothing(tmp_path, caplog):
    tracker = WandbTracker(mode="disabled")
    record(tracker, tmp_path)
    assert tracker.where()[1:] == ["W&B: off (disabled)"] and not caplog.text


def test_an_unknown_mode_is_refused():
    for mode in ("bogus", "", False):
        with pytest.raises(UserError, match=f"`mode` must be one of auto, online, offline, disabled, it is '{mode}'"):
            WandbTracker(mode=mode)


def test_a_value_that_is_no_number_is_null_in_the_record(tmp_path):
    tracker = Tracker()
    tracker.start(tmp_path, RUN, CONFIG)
    tracker.log(1, {"eval/loss": float("nan"), "train/gradient_norm": float("inf"), "eval/score": 0.5})
    assert "NaN" not in tracker.path.read_text()
    assert lines(tracker)[0] | {"seconds": 0} == {
        "step": 1, "seconds": 0, "eval/loss": None, "train/gradient_norm": None, "eval/score": 0.5,
    }  # fmt: skip


@contextlib.contextmanager
def server(answers: bool):
    """A server that answers every request with 404, or accepts connections and says nothing; gives its address."""
    if answers:
        with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as made:
            threading.Thread(target=made.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{made.server_port}"
            made.shutdown()
    else:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_key_or_network_wandb_goes_offline_by_itself(monkeypatch, no_account):
    assert WandbTracker().mode == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    assert WandbTracker().mode == "offline"
    for answers, mode in ((True, "online"), (False, "offline")):
        with server(answers) as address:
            monkeypatch.setenv("WANDB_BASE_URL", address)
            assert WandbTracker().mode == mode, answers
    monkeypatch.setenv("WANDB_BASE_URL", "https://127.0.0.1:no")
    assert WandbTracker().mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbTracker().mode == "disabled"
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(UserError, match="WANDB_MODE must be one of auto, online, offline, disabled, it is 'bogus'"):
        WandbTracker()


def test_online_without_a_key_is_refused_before_anybody_is_asked_for_it(no_account, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no API key for https://api.wandb.ai: run `wandb login`, or say tracker.mode"):
        WandbTracker(mode="online")
    (tmp_path / "keys").write_text(f"machine api.wandb.ai login user password {'x' * 40}")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert WandbTracker(mode="online").mode == "online"


def test_a_server_that_never_answers_leaves_an_offline_copy(no_account, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(WandbTracker, "init_timeout", 3)
    with server(answers=False) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        tracker = WandbTracker(mode="online")
        with caplog.at_level(logging.WARNING):
            record(tracker, tmp_path)
    assert "W&B is not online" in caplog.text and "this run is recorded offline" in caplog.text
    assert tracker.where()[-1].startswith("to upload it later: wandb sync")
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [r.WhichOneof("record_type") for r in wandb_records(files[0])].count("history") == 2


def test_a_continued_record_drops_what_came_after_the_checkpoint_and_what_a_kill_cut_short(tmp_path):
    first = Tracker()
    first.start(tmp_path, RUN, CONFIG)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": 1 / step})
    first.finish("interrupted", {})
    with first.path.open("ab") as file:
        file.write(b'\xff\n[1]\n{"step": "ten"}\n{"step": 15}\n{"step": 40, "train/lo')
    again = WandbTracker(mode="offline")
    again.start(tmp_path, RUN, CONFIG, {"step": 20})
    again.log(30, {"train/loss": 0.5})
    again.finish("finished", {})
    assert [line.get("step") for line in lines(again)] == [10, 20, 30, None]
    assert lines(again)[2]["train/loss"] == 0.5
    assert lines(again)[2]["seconds"] >= lines(again)[1]["seconds"]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")  # whole by itself: the earlier steps are in it
    records = [r for r in wandb_records(file) if r.WhichOneof("record_type") == "history"]
    assert len(records) == 3
