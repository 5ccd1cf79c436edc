"""The model card of a published model: what it is, how robust it was found to be, how to load it, what to cite.

Everything in it comes from the run's config.json and from the results.json of an evaluation; what is not known is
said to be unknown. No path of the machine it was made on gets into it.
"""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mimir_fast.evaluation.options import NORM_WORDS
from mimir_fast.evaluation.results import Results
from mimir_fast.sizes import as_size, shown

PAPER = "https://arxiv.org/abs/2312.04960"
BIBTEX = """@article{xu2023mimir,
  title   = {{MIMIR}: Masked Image Modeling for Mutual Information-based Adversarial Robustness},
  author  = {Xu, Xiaoyun and Yu, Shujian and Liu, Zhuoran and Picek, Stjepan},
  journal = {arXiv preprint arXiv:2312.04960},
  year    = {2023}
}"""


def card(
    kind: str,
    class_name: str,
    outline: str,
    config: dict[str, Any],
    results: Results | None,
    repo_id: str,
    license: str,
    timm: dict[str, Any],
) -> ModelCard:
    """The card.

    Args:
        kind: `classifier` or `masked autoencoder`.
        class_name: of this package's class that loads it.
        outline: the architecture in words.
        config: the run's configuration, or as much of it as is known.
        results: of an evaluation; None for none.
        repo_id: `user/name`, or the folder's name.
        timm: what timm reads of config.json, {} where it cannot build the model.
    """
    data = ModelCardData(
        library_name="mimir_fast", license=license, tags=["adversarial-robustness", "vision-transformer", "mimir"],
        pipeline_tag="image-classification" if kind == "classifier" else None,
        model_name=repo_id.rpartition("/")[2], eval_results=_evaluated(results) if results else None,
    )  # fmt: skip
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"A {kind} of [mimir-fast](https://arxiv.org/abs/2312.04960): {outline}. Images are floats in [0, 1], RGB; the "
        "normalization, if there is one, is inside the model.",
        "## Training\n\n" + _training(config),
    ]
    if kind == "classifier":
        parts.append("## Robustness\n\n" + _robustness(results))
    parts.append(_loading(kind, class_name, repo_id, timm))
    parts.append(f"## Citation\n\n```bibtex\n{BIBTEX}\n```")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


INSTALL = "pip install '.[train]'"
"""In a checkout: the package is on no index."""


def _loading(kind: str, class_name: str, repo_id: str, timm: dict[str, Any]) -> str:
    text = "## Loading\n\n"
    if timm:
        mean, std = (timm["pretrained_cfg"][name] for name in ("mean", "std"))
        text += (
            f"With timm (`pip install timm`), or transformers and timm; both take images normalised by mean {mean} and "
            f"std {std}:\n\n```python\nimport timm\n\n"
            f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()  # a folder: "local-dir:PATH"\n'
            "```\n\n```python\nfrom transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
            f'model = AutoModelForImageClassification.from_pretrained("{repo_id}")\n'
            f'processor = AutoImageProcessor.from_pretrained("{repo_id}")\n```\n\n'
        )
    command = "evaluate --checkpoint" if kind == "classifier" else "finetune --init"
    export = "" if timm else "; `mimir-fast export model.safetensors --output timm.safetensors` writes them for timm"
    return text + (
        f"With mimir_fast, which is on no package index (`{INSTALL}` in a checkout of it, or its wheel):\n\n"
        f"```python\nfrom mimir_fast.hub import {class_name}\n\n"
        f'model = {class_name}.from_pretrained("{repo_id}")\n```\n\n'
        f"or, for the commands, `mimir-fast {command} model.safetensors`{export}."
    )


def _training(config: dict[str, Any]) -> str:
    if not {"recipe", "method", "run"} & config.keys():
        return "Not known: these weights came without a configuration."
    run, data, attack = (config.get(name) or {} for name in ("run", "data", "objective"))
    attack, size = attack.get("attack") or {}, data.get("image_size")
    size = shown(as_size(size)) if isinstance(size, (list, tuple)) else size
    lines = [("recipe", config.get("recipe")), ("method", config.get("method")), ("preset", config.get("preset")),
             ("data", data.get("source")), ("image size", size), ("epochs", run.get("epochs")),
             ("batch size", run.get("batch_size")), ("seed", run.get("seed"))]  # fmt: skip
    if attack:
        steps = attack.get("num_steps")
        lines.append(("attack while training", f"L∞, ε = {_as_255(attack.get('eps'))}, α = "
                      f"{_as_255(attack.get('alpha'))}, {steps} step{'s' if steps != 1 else ''}"))  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in lines if value not in (None, ""))
    return f"| | |\n| --- | --- |\n{table}\n\nAll options are in config.json."


def _as_255(value: float | None) -> str:
    return "not said" if value is None else f"{255 * value:g}/255"


def _robustness(results: Results | None) -> str:
    if results is None:
        return (
            "This model has not been evaluated. Before relying on it: `mimir-fast evaluate --checkpoint "
            "model.safetensors --suite paper`."
        )
    numbers, images = results.sections["accuracy"], results.images
    ball = f"{NORM_WORDS[numbers['norm']]}, ε = {numbers['eps_text']}"
    header, _, row = results.rows["markdown"].splitlines()
    # The first column is the path it was evaluated from.
    head, values = ([cell.strip() for cell in line.strip("| ").split(" | ")][1:] for line in (header, row))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), values))
    notes = "".join(f"\n- {note}" for note in results.notes)
    return (
        f"Threat model: white-box, {ball}, images in [0, 1]; evaluated on {images['count']} images of "
        f"{images['source']} ({images['split']}), in per cent:\n\n{table}\n\n{results.verdicts['robustness']['text']} "
        f"{results.verdicts['validity']['text']}" + (f"\n{notes}" if notes else "")
    )


def _evaluated(results: Results) -> list[EvalResult]:
    source, ball = results.images["source"], f"L∞ {results.sections['accuracy']['eps_text']}"
    if results.sections["accuracy"]["norm"] != "linf":
        ball = f"{NORM_WORDS[results.sections['accuracy']['norm']]} {results.sections['accuracy']['eps_text']}"
    shown = [("accuracy", "natural accuracy", results.clean)]
    if results.attacked:
        shown.append(("accuracy", f"robust accuracy ({ball})", results.robust))
    return [
        EvalResult(
            task_type="image-classification", dataset_type=source, dataset_name=source, metric_type=metric,
            metric_name=name, metric_value=round(100 * counts["accuracy"], 2),
        )
        for metric, name, counts in shown
    ]  # fmt: skip
