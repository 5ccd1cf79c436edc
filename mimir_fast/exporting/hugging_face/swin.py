"""Swin in transformers: the same, but that it merges tokens at the end of a stage, not in front of the next."""

from typing import Any, cast

from torch import Tensor

from mimir_fast.exporting.hugging_face import Rules, Twin, block_rules, register, renamed, shared_config
from mimir_fast.exporting.original import Original
from mimir_fast.models.families.swin import SwinEncoder, WindowAttention

_LAST = r"\.(weight|bias)"


def build(original: Original) -> Twin:
    """A classifier, or the encoder."""
    is_classifier = original.num_classes is not None
    class_name, prefix = ("SwinForImageClassification", "swin.") if is_classifier else ("SwinModel", "")
    encoder: Any = cast(SwinEncoder, original.model.encoder)
    attentions = [stage.blocks[0].attn for stage in encoder.stages]
    config = shared_config(original, original.model) | {
        "model_type": "swin", "embed_dim": encoder.token_width, "depths": list(encoder.depths),
        "num_heads": [attn.num_heads for attn in attentions], "window_size": attentions[0].window,
        "mlp_ratio": encoder.stages[0].blocks[0].mlp.fc1.out_features / encoder.token_width,
        "qkv_bias": True, "use_absolute_embeddings": False, "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    rules: Rules = {
        rf"patch_embed\.proj{_LAST}": rf"{prefix}embeddings.patch_embeddings.projection.\1",
        rf"patch_embed\.norm{_LAST}": rf"{prefix}embeddings.norm.\1",
        rf"stages\.(\d+)\.downsample\.(norm|reduction){_LAST}":
            lambda m: f"{prefix}encoder.layers.{int(m[1]) - 1}.downsample.{m[2]}.{m[3]}",
        r"stages\.(\d+\.blocks\.\d+)\.attn\.relative_position_bias_table":
            rf"{prefix}encoder.layers.\1.attention.self.relative_position_bias_table",
        rf"norm{_LAST}": rf"{prefix}layernorm.\1",
        rf"head{_LAST}": r"classifier.\1",
        **block_rules("stages", f"{prefix}encoder.layers", "self"),
    }  # fmt: skip
    tensors = renamed(original.without_decoder, rules, class_name) | _offsets(encoder, prefix)
    return Twin(class_name, config, tensors, {}, "logits" if is_classifier else "last_hidden_state")


def _offsets(encoder: SwinEncoder, prefix: str) -> dict[str, Tensor]:
    """Which row of the table is for which query and key: transformers before version 5 reads it from the file."""
    return {
        f"{prefix}encoder.layers.{name.removeprefix('stages.').removesuffix('.attn')}.attention.self"
        ".relative_position_index": module.offsets_AA.clone()
        for name, module in encoder.named_modules()
        if isinstance(module, WindowAttention)
    }


register("swin", build)
