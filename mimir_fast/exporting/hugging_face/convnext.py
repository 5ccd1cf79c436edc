"""ConvNeXt in transformers, which has the norm behind the mean of the tokens, as our classifiers."""

from typing import Any, cast

from mimir_fast.exporting.hugging_face import Twin, register, renamed, shared_config
from mimir_fast.exporting.original import Original
from mimir_fast.models.families.convnext import ConvNextEncoder

_LAST = r"\.(weight|bias)"
_RULES = {
    rf"stem\.0{_LAST}": r"convnext.embeddings.patch_embeddings.\1",
    rf"stem\.1{_LAST}": r"convnext.embeddings.layernorm.\1",
    rf"stages\.(\d+)\.downsample\.(\d){_LAST}": r"convnext.encoder.stages.\1.downsampling_layer.\2.\3",
    rf"stages\.(\d+)\.blocks\.(\d+)\.conv_dw{_LAST}": r"convnext.encoder.stages.\1.layers.\2.dwconv.\3",
    rf"stages\.(\d+)\.blocks\.(\d+)\.norm{_LAST}": r"convnext.encoder.stages.\1.layers.\2.layernorm.\3",
    rf"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d){_LAST}": r"convnext.encoder.stages.\1.layers.\2.pwconv\3.\4",
    r"stages\.(\d+)\.blocks\.(\d+)\.gamma": r"convnext.encoder.stages.\1.layers.\2.layer_scale_parameter",
    rf"fc_norm{_LAST}": r"convnext.layernorm.\1",
    rf"head{_LAST}": r"classifier.\1",
}


def build(original: Original) -> Twin:
    """A classifier.

    Raises:
        ValueError: an encoder, whose norm transformers cannot place.
    """
    if original.num_classes is None:
        raise ValueError(
            "this encoder norms each token, transformers' ConvNextModel their mean only: fine-tune it first, or take "
            "--format timm, onnx, pt2 or torchscript"
        )
    encoder: Any = cast(ConvNextEncoder, original.model.encoder)
    # Its layer_norm_eps is that of the last norm.
    config = shared_config(original, cast(Any, original.model).fc_norm) | {
        "model_type": "convnext", "num_stages": len(encoder.depths), "depths": list(encoder.depths),
        "hidden_sizes": [stage.blocks[0].conv_dw.out_channels for stage in encoder.stages], "drop_path_rate": 0.0,
    }  # fmt: skip
    tensors = renamed(original.without_decoder, _RULES, "ConvNextForImageClassification")
    return Twin("ConvNextForImageClassification", config, tensors, {}, "logits")


register("convnext", build)
