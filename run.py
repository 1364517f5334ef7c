"""Train one method on one task: compose, build, train, record.

    python run.py task=mnli method=increlora

`python run.py --help` lists the groups and every key.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from increlora import config, results


@config.guarded
@hydra.main(config_path="configs", config_name="config", version_base="1.3")
@config.guarded
def main(cfg: DictConfig) -> float | None:
    """One run; returns the best primary score (for sweepers)."""
    run = config.identity(cfg, HydraConfig.get().overrides.task)
    run_dir, resolved = config.run_directory(cfg, run), config.resolved(cfg)
    result = None if cfg.overwrite else results.stored(run_dir, resolved)
    if result is None:
        result, where = train(cfg, run, run_dir, resolved)
    else:
        where = [f"this run was finished before (overwrite=true runs it again): {run_dir / results.FILE_NAME}"]
    print("\n".join([results.summary(result), *where]))
    return result["scores"].get("best", {}).get("score")


def train(cfg: DictConfig, run: dict, run_dir: Path, resolved: dict) -> tuple[dict, list[str]]:
    """Build everything, train, write the result; returns it and where the records lie."""
    from increlora.train import train as loop  # torch and transformers: only when there is something to train

    settings, method, task = config.build(cfg.train), config.build(cfg.method), config.build(cfg.task)
    backbone, tracker = config.build(cfg.backbone), config.build(cfg.tracker)
    device = settings.torch_device
    tokenizer = backbone.tokenizer()
    data = task.load(tokenizer)
    model = backbone.model(task.num_labels, task.head_dropout)
    tracker.start(run_dir, run, resolved)
    status, summary = "failed", {}
    try:
        outcome = loop(model, method, task, data, settings, tracker, tokenizer.pad_token_id)
        result = results.build(run, resolved, data, outcome, str(device))
        path = results.write(run_dir, result)
        status, summary = outcome.status, {name: s["score"] for name, s in result["scores"].items()}
    finally:
        tracker.finish(status, summary)
    return result, [f"result: {path}", *tracker.where()]


if __name__ == "__main__":
    main()
