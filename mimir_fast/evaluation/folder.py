"""The folder of an evaluation: made ready, recognised, or emptied.

OUTPUT_DIR/progress/plan.json   {"num_shards": …, "identity": {…}, "others": {name of another model: {…}}}
"""

import json
from typing import Any

import torch.distributed as dist

from mimir_fast.checkpoints.durable import remove, write_text
from mimir_fast.evaluation.changes import changes
from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.models.load_report import FILE_NAME

WRITTEN = ("progress", "adversarial", "surrogates", "results.json", "report.html", FILE_NAME)
"""All that an evaluation writes into its folder."""


def open_folder(
    config: CommonOptions, identity: dict[str, Any], others: dict[str, Any], num_shards: int, *, main: bool
) -> tuple[int, dict[str, Any]]:
    """Make the folder ready on the main process.

    Args:
        others: name → identity of other models; those that the folder does not know yet are added.
    Returns:
        the number of shards and the identity that hold in it.
    Raises:
        ValueError: the folder holds the evaluation of another model or of other images, or something else.
    """
    progress = config.folder / "progress"
    plan = progress / "plan.json"
    if main:
        if not plan.exists() and config.folder.exists() and any(config.folder.iterdir()):
            raise ValueError(f"{config.folder} is not empty and holds no evaluation of ours: give another --output_dir")
        if config.overwrite and plan.exists():
            for name in reversed(WRITTEN):  # progress last: while it is there, the folder is known for ours
                if (config.folder / name).exists():
                    remove(config.folder / name)
        progress.mkdir(parents=True, exist_ok=True)
        if not plan.exists():
            write_text(plan, json.dumps({"num_shards": num_shards, "identity": identity}, indent=1) + "\n")
        for done in progress.glob("done.*.json"):
            if json.loads(done.read_text()).get("failed"):  # tried again
                done.unlink()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # all are at their start: this one waits for seconds
    saved = json.loads(plan.read_text())
    known = saved.get("others", {})
    both = {name: others[name] for name in others if name in known}
    changed = [changes(saved["identity"], identity), changes({name: known[name] for name in both}, both)]
    if any(changed):
        raise ValueError(
            f"{config.folder} holds the evaluation of something else ({'; '.join(filter(None, changed))}); give "
            "another --output_dir, or --overwrite to start anew there"
        )
    if main and len(both) < len(others):
        write_text(plan, json.dumps(saved | {"others": others | known}, indent=1) + "\n")
    return int(saved["num_shards"]), saved["identity"]
