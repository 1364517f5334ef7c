"""What is recorded while a run trains: JSON lines in the run directory, copied to Weights & Biases.

The local file is complete by itself. W&B gets the same values in one call per step; if it fails, the run continues.
"""

import contextlib
import http.client
import io
import logging
import netrc
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from increlora.errors import UserError
from increlora.files import as_json, parsed_json, write_text, writing
from increlora.matrices import rank_map

log = logging.getLogger(__name__)
MODES = ("auto", "online", "offline", "disabled")


class Tracker:
    """JSON lines only: one object per line of `metrics.jsonl`, with `step`, `seconds` and the values."""

    def start(
        self,
        run_dir: Path,
        run: Mapping[str, Any],
        config: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the record of a run.

        Args:
            run: identity of the run (backbone, budget, method, task, seed, ...).
            config: the resolved configuration.
            state: of the checkpoint that the run continues from; what was recorded after it is dropped.

        Raises:
            UserError: the record cannot be written.
        """
        self.path = run_dir / "metrics.jsonl"
        self.kinds = config["method"]["kinds"]
        self.step = state["step"] if state else 0
        kept = self._lines_until(self.step) if state else []
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.started = time.perf_counter()
        with writing(self.path):
            run_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(as_json(line) + "\n" for line in kept), follow=False)
        with writing(self.path):
            self.file = self.path.open("a", encoding="utf-8")

    def _lines_until(self, step: int) -> list[dict[str, Any]]:
        """The recorded lines up to a step; a line that a kill cut short, or that is none of ours, is dropped."""
        lines = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(parsed_json(line))
        return [
            line for line in lines
            if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= step
            and isinstance(line.get("seconds"), int | float)
        ]  # fmt: skip

    def log(self, step: int, values: Mapping[str, float], ranks: Mapping[str, int] | None = None) -> None:
        """Record one step; call once per step.

        Args:
            step: optimizer steps taken.
            values: by W&B key; an empty mapping without ranks records nothing.
            ranks: rank of every matrix, given at the steps at which ranks changed.
        """
        self.step = step
        if not values and ranks is None:
            return
        seconds = self.before + time.perf_counter() - self.started
        line = {"step": step, "seconds": round(seconds, 3), **values}
        self._write(line | ({"ranks": dict(ranks)} if ranks is not None else {}))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Close the record; `status` is finished, diverged, interrupted or failed."""
        self._write({"status": status, **summary})
        self.file.close()

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to continue the same record."""
        return {"step": self.step}

    def _write(self, line: Mapping[str, Any]) -> None:
        with writing(self.path):
            self.file.write(as_json(line) + "\n")
            self.file.flush()

    def where(self) -> list[str]:
        """Lines for the user: where the records are."""
        return [f"local record: {self.path}"]


class WandbTracker(Tracker):
    """The local record, mirrored to Weights & Biases.

    Args:
        project, entity, tags: as in `wandb.init`.
        mode: online, offline, disabled, or auto: online where an API key and the network are there.

    Raises:
        UserError: `mode` is none of these, or it is online and there is no API key.
    """

    init_timeout = 30  # seconds that W&B may take to begin a run online

    def __init__(
        self,
        project: str = "increlora",
        entity: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
    ):
        if mode not in MODES:
            raise UserError(f"`mode` must be one of {', '.join(MODES)}, it is '{mode}'")
        self.project, self.entity, self.tags = project, entity, list(tags or [])
        self.mode = mode
        if mode == "auto":
            wanted = os.environ.get("WANDB_MODE", "")
            if wanted and wanted not in MODES:
                raise UserError(f"WANDB_MODE must be one of {', '.join(MODES)}, it is '{wanted}'")
            self.mode = wanted if wanted not in ("", "auto") else "online" if _has_key() and _answers() else "offline"
        if self.mode == "online" and not _has_key():  # W&B would ask for it and wait
            raise UserError(f"W&B has no API key for {_server()}: run `wandb login`, or say tracker.mode=offline")

    def start(
        self,
        run_dir: Path,
        run: Mapping[str, Any],
        config: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        super().start(run_dir, run, config, state)
        self.run: Any = None  # a wandb.Run
        self.failed = False
        if self.mode == "online":
            try:
                return self._init(run_dir, run, config, state or {})
            except Exception as error:  # a server that is silent or refuses must not cost the record
                log.warning("W&B is not online (%s: %s); this run is recorded offline", type(error).__name__, error)
                self.mode = "offline"
        self._mirror(lambda: self._init(run_dir, run, config, state or {}))

    def _init(self, run_dir: Path, run: Mapping[str, Any], config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        import wandb

        # an offline run cannot be continued: a new one is made and filled from the local record
        online = self.mode == "online" and state.get("wandb_id")
        self.run = wandb.init(
            **({"id": state["wandb_id"], "resume": "allow"} if online else {}),
            project=self.project,
            entity=self.entity,
            dir=run_dir,
            mode=self.mode,
            name="-".join(str(run[key]) for key in ("task", "method", "budget", "backbone", "seed")),
            group="-".join(str(run[key]) for key in ("task", "method", "budget", "backbone")),
            tags=[*self.tags, *(str(run[key]) for key in ("task", "method", "budget", "backbone"))],
            config={"run": dict(run), **config},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self.init_timeout,
                login_timeout=self.init_timeout,
                finish_timeout=300,  # what is not uploaded then can be: `wandb sync`
            ),
        )
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric("eval/score", summary="max")
        for line in [] if online else self._lines_until(self.step):
            ranks = line.pop("ranks", None)
            self.run.log({**line, **self._rank_media(ranks)}, step=line["step"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"wandb_id": self.run.id} if self.run is not None else {})

    def log(self, step: int, values: Mapping[str, float], ranks: Mapping[str, int] | None = None) -> None:
        super().log(step, values, ranks)
        if values or ranks is not None:
            self._mirror(lambda: self.run.log({"step": step, **values, **self._rank_media(ranks)}, step=step))

    def _rank_media(self, ranks: Mapping[str, int] | None) -> dict[str, Any]:
        """The rank heat map, layer x matrix, as an image and as a table."""
        if not ranks:
            return {}
        import wandb

        layers, kinds, cells = rank_map(ranks, self.kinds)
        table = wandb.Table(columns=["layer", *kinds], data=[[n, *row] for n, row in zip(layers, cells, strict=True)])
        return {"rank_map/image": wandb.Image(_draw(layers, kinds, cells)), "rank_map/table": table}

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        super().finish(status, summary)
        self._mirror(lambda: self._finish(status, summary))

    def _finish(self, status: str, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({"status": status, **summary})
        self.run.finish(exit_code=0 if status == "finished" else 1)

    def where(self) -> list[str]:
        if self.run is None:
            return [*super().where(), f"W&B: off ({'see the warning above' if self.failed else 'disabled'})"]
        if self.mode == "offline":
            folder = Path(self.run.settings.sync_dir)
            return [*super().where(), f"W&B (offline): {folder}", f"to upload it later: wandb sync {folder}"]
        return [*super().where(), f"W&B: {self.run.url or self.mode}"]

    def _mirror(self, call: Callable[[], Any]) -> None:
        """Run a W&B call; a failure ends the mirroring, not the training."""
        if self.mode == "disabled":
            return
        try:
            call()
        except Exception as error:  # no exception of a third party's client may end a run
            self.mode, self.run, self.failed = "disabled", None, True
            log.warning("W&B failed (%s: %s); the local record continues in %s", type(error).__name__, error, self.path)


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _has_key() -> bool:
    """Whether W&B has credentials for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_server()).hostname or ""))
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _answers() -> bool:
    """Whether W&B's server answers within three seconds, whatever it says."""
    try:
        urllib.request.urlopen(_server(), timeout=3).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: an address that is none
        return False
    return True


def _draw(layers: list[int], kinds: list[str], cells: list[list[int]]) -> Any:
    """The rank map as a small picture."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(1 + 0.45 * len(layers), 0.6 + 0.35 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow([list(row) for row in zip(*cells, strict=True)], cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    for x, row in enumerate(cells):
        for y, rank in enumerate(row):
            axes.text(x, y, str(rank), ha="center", va="center", color="white", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


class Silent(Tracker):
    """Records nothing: for all processes but the first one."""

    def start(self, *arguments: Any, **keywords: Any) -> None:
        self.step = 0

    def log(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def finish(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def where(self) -> list[str]:
        return []
