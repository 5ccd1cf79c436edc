"""ViT in transformers: by its pooling a ViT or a BEiT, with its decoder a ViTMAE, without head and decoder a ViTModel.

`ViTForImageClassification` reads the cls token after the norm. The mean of the patch tokens with the norm behind it, as
in MAE's fine-tuning, is BEiT's head: a `BeitForImageClassification` with absolute positions and without relative ones
is that ViT. BEiT's keys have no bias, and need none: it adds the same number to all scores of a query, which softmax
does not see.
"""

from typing import Any, cast

from mimir_fast.exporting.hugging_face import Twin, block_rules, register, renamed, shared_config
from mimir_fast.exporting.original import Original
from mimir_fast.models.classifier import Classifier
from mimir_fast.models.families.vit import VitEncoder
from mimir_fast.models.masked_loading import load_masked_model

_LAST = r"\.(weight|bias)"


def build(original: Original) -> Twin:
    """The class for what these weights are."""
    tensors = original.tensors
    config = shared_config(original, original.model) | _encoder_config(original)
    if original.num_classes is not None:
        pooled = cast(Classifier, original.model).config.global_pool
        if pooled == "cls":
            return _classifier(original, "ViTForImageClassification", "vit", config)
        if "fc_norm.weight" not in tensors:
            raise ValueError(
                "transformers' ViT reads the cls token, its BEiT the mean token in front of the norm; this classifier "
                "reads the mean token behind the norm: --format onnx, pt2 and torchscript take it"
            )
        config |= {"use_absolute_position_embeddings": True, "use_mean_pooling": True, "use_mask_token": False,
                   "use_relative_position_bias": False, "use_shared_relative_position_bias": False,
                   "layer_scale_init_value": 0.0, "drop_path_rate": 0.0}  # fmt: skip
        del config["qkv_bias"]
        return _classifier(original, "BeitForImageClassification", "beit", config)
    if "decoder_embed.weight" in tensors:
        return _masked(original, config)
    model = renamed(original.without_decoder, _encoder_rules(""), "ViTModel")
    return Twin("ViTModel", {"model_type": "vit"} | config, model, {"add_pooling_layer": False}, "last_hidden_state")


def _classifier(original: Original, class_name: str, kind: str, config: dict[str, Any]) -> Twin:
    rules = _encoder_rules(f"{kind}.") | {
        rf"head{_LAST}": r"classifier.\1", rf"fc_norm{_LAST}": rf"{kind}.pooler.layernorm.\1",
    }  # fmt: skip
    tensors = renamed(original.without_decoder, rules, class_name)
    if kind == "beit":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attention.key.bias")}
    return Twin(class_name, {"model_type": kind} | config, tensors, {}, "logits")


def _masked(original: Original, config: dict[str, Any]) -> Twin:
    """The whole masked autoencoder, which transformers masks by itself."""
    model, objective = load_masked_model(original.plain_weights)
    decoder: Any = model.decoder
    config = shared_config(original, model) | config | {
        "decoder_hidden_size": decoder.mask_token.shape[-1],
        "decoder_num_hidden_layers": len(decoder.decoder_blocks),
        "decoder_num_attention_heads": decoder.decoder_blocks[0].attn.num_heads,
        "decoder_intermediate_size": decoder.decoder_blocks[0].mlp.fc1.out_features,
        "mask_ratio": objective.get("mask_ratio", 0.75),
        "norm_pix_loss": objective.get("norm_pix_loss", True),
    }  # fmt: skip
    rules = _encoder_rules("vit.") | block_rules("decoder_blocks", "decoder.decoder_layers", "attention") | {
        r"mask_token|decoder_pos_embed": r"decoder.\g<0>",
        r"decoder_(embed|norm|pred)\.(weight|bias)": r"decoder.\g<0>",
    }  # fmt: skip
    tensors = renamed(original.tensors, rules, "ViTMAEForPreTraining")
    return Twin("ViTMAEForPreTraining", {"model_type": "vit_mae"} | config, tensors, {}, "logits")


def _encoder_config(original: Original) -> dict[str, Any]:
    encoder = cast(VitEncoder, original.model.encoder)
    return {
        "hidden_size": encoder.width, "num_hidden_layers": encoder.num_layers, "num_attention_heads": encoder.num_heads,
        "intermediate_size": len(original.tensors["blocks.0.mlp.fc1.weight"]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in original.tensors,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _encoder_rules(prefix: str) -> dict[str, str]:
    rules = {
        "cls_token": f"{prefix}embeddings.cls_token",
        "pos_embed": f"{prefix}embeddings.position_embeddings",
        rf"patch_embed\.proj{_LAST}": rf"{prefix}embeddings.patch_embeddings.projection.\1",
        rf"norm{_LAST}": rf"{prefix}layernorm.\1",
    }
    return {**rules, **block_rules("blocks", f"{prefix}encoder.layer", "attention")}


register("vit", build)
