"""Train one method on one task: compose, build, train, record.

    python run.py task=mnli method=increlora

`python run.py --cfg job` shows every key. The same command later continues a run that was cut off, or returns the
stored result of a finished run. Several processes: `torchrun --nproc-per-node N run.py ...`.
"""

import contextlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from increlora import result_files
from increlora.glue import config, identity, results

# on a CPU torch keeps a kernel for every shape of product that it meets, up to 1,024; ranks that grow make many shapes
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


@config.guarded
@hydra.main(config_path="configs", config_name="config", version_base="1.3")
@config.guarded
def main(cfg: DictConfig) -> float | None:
    """One run; returns the best primary score (for sweepers), None if a job of a multirun cannot be done."""
    with config.of_a_multirun(HydraConfig.get()):
        return one(cfg)


def one(cfg: DictConfig) -> float | None:
    """Find the run's result, or train; returns the best primary score."""
    cfg = config.recorded(cfg, HydraConfig.get())
    run = config.identity(cfg, HydraConfig.get().overrides.task)
    run_dir, resolved = config.run_directory(cfg, run), config.resolved(cfg)
    result = None if cfg.overwrite else results.stored(run_dir, resolved, lambda: config.inputs(cfg))
    if result is None:
        result, where = train(cfg, run, run_dir, resolved)
    else:
        where = [f"this run was finished before (overwrite=true runs it again): {run_dir / result_files.FILE_NAME}"]
    if where:
        print("\n".join([results.summary(result), *where]))
    return result["scores"].get("best", {}).get("score")


def train(cfg: DictConfig, run: dict, run_dir: Path, resolved: dict) -> tuple[dict, list[str]]:
    """Build everything, train, write the result; returns it and where the records lie."""
    from increlora import distributed
    from increlora.errors import Interrupted
    from increlora.glue import machine, tracker  # torch: only when there is something to train
    from increlora.glue.checkpoint import Checkpoints, exclusive
    from increlora.glue.loop import train as loop

    distributed.start(cfg.device)
    settings, method, task = config.build(cfg.train), config.build(cfg.method), config.build(cfg.task)
    device = settings.torch_device  # a GPU that is absent is refused before anything is loaded
    backbone = config.build(cfg.backbone)
    recorder = config.build(cfg.tracker) if distributed.is_main() else tracker.Silent()
    tokenizer = backbone.tokenizer()
    data = task.load(tokenizer)
    model = backbone.model(task.num_labels, task.head_dropout)
    with config.readable_errors(cfg.method):
        method.prepare(model, settings.total_steps(len(data.train)))
    backbone.refuse_frozen_head(model)
    code, inputs = machine.code_state(str(device)), identity.inputs(task, backbone, method)
    same = identity.of_checkpoint(resolved, inputs, distributed.processes())
    commit = f"{code['commit'] or 'unknown'}{'-dirty' if code['dirty'] else ''}"
    checkpoints = Checkpoints(run_dir, same, [commit], [code["threads"]], [code["gpu"] or "CPU"])
    with exclusive(run_dir) if distributed.is_main() else contextlib.nullcontext():
        done = None if cfg.overwrite else finished_meanwhile(run_dir, resolved, inputs)
        if done is not None:
            distributed.stop()
            return done, [f"another process has finished this run meanwhile: {run_dir / result_files.FILE_NAME}"]
        if cfg.overwrite and distributed.is_main():
            (run_dir / result_files.FILE_NAME).unlink(missing_ok=True)  # first: it must not stand beside other weights
            checkpoints.clear("best", "last")
        state = None if cfg.overwrite else checkpoints.load()
        if state and distributed.is_main():
            print(f"continuing from step {state['progress']['step']}: {checkpoints.path('checkpoint')}")
        recorder.start(run_dir, run, resolved, state and state["tracker"])
        status, summary, where = "failed", {}, []
        try:
            outcome = loop(model, method, task, data, settings, recorder, tokenizer.pad_token_id, checkpoints, state)
            code |= {"commits": checkpoints.commits, "threads_of_sessions": checkpoints.threads,
                     "machines_of_sessions": checkpoints.machines}  # fmt: skip
            result = results.build(run, resolved, data, outcome, code, inputs, checkpoints.digests())
            if distributed.is_main():
                results.write(run_dir, result)
                checkpoints.clear()
                where = [f"result: {run_dir / result_files.FILE_NAME}", *recorder.where()]
            status, summary = outcome.status, {name: s["score"] for name, s in result["scores"].items()}
        except Interrupted as error:
            status = "interrupted"
            if cfg.overwrite:
                raise Interrupted(f"{error} (without overwrite=true)", error.signal) from None
            raise
        finally:
            recorder.finish(status, summary)
            distributed.stop()
    return result, where


def finished_meanwhile(run_dir: Path, resolved: dict, inputs: dict) -> dict | None:
    """The result that another process wrote between the first look and the lock; the same in every process."""
    from increlora import distributed

    if not any(distributed.gather((run_dir / result_files.FILE_NAME).exists())):
        return None
    return results.stored(run_dir, resolved, lambda: inputs)


if __name__ == "__main__":
    sys.argv[1:] = config.spelled(sys.argv[1:])
    main()
    sys.exit(config.failed_jobs())
