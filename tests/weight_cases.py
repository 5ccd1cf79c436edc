"""Files of weights as the field writes them, made by the packages themselves at small sizes and with random numbers.

A case writes its file into a folder and returns where it is, and what the package computes from images in [0, 1]:
tokens after the last norm (B, T, D), logits (B, K), or None where the package has no such thing.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from family_checks import shaken
from safetensors.torch import save_file
from small_models import masked_vit
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn

from mimir_fast.models.file_names import to_files

try:
    import transformers
except ImportError:
    transformers = None  # type: ignore[assignment]

IMAGE, CLASSES = 32, 5
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Written:
    """A file on the disk, and what its model computes."""

    path: Path
    features: Function | None = None
    logits: Function | None = None


Case = Callable[[Path], Written]
CASES: dict[str, Case] = {}
NEEDS_TRANSFORMERS: set[str] = set()


def case(name: str, *, hugging_face: bool = False) -> Callable[[Case], Case]:
    """Register a case under the words that the table shows."""

    def add(write: Case) -> Case:
        CASES[name] = write
        if hugging_face:
            NEEDS_TRANSFORMERS.add(name)
        return write

    return add


def vit(seed: int = 0, kind: type[nn.Module] = VisionTransformer, **options: Any) -> Any:
    """A small ViT of timm's, moved away from its initialisation."""
    torch.manual_seed(seed)
    sizes = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": CLASSES}
    return shaken(kind(**(sizes | options))).eval()


def written(path: Path, content: Any, model: Any = None, *, normalise: Any = None) -> Written:
    """Saved by torch or safetensors, after the suffix; `model` is timm's, behind (x − mean) / std."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    if model is None:
        return Written(path)
    before = normalise or (lambda x: x)
    has_head = getattr(model, "num_classes", 0) > 0
    return Written(
        path, lambda x: model.forward_features(before(x)), (lambda x: model(before(x))) if has_head else None
    )


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def headless(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the head."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


_VIT_KINDS: dict[str, dict[str, Any]] = {
    "timm ViT, cls token": {},
    "timm ViT, mean of patches": {"global_pool": "avg"},
    "timm ViT, no head": {"num_classes": 0},
    "timm ViT, one channel": {"in_chans": 1},
    "timm ViT, patches of 4": {"patch_size": 4},
    "timm ViT, MLP ratio 3": {"mlp_ratio": 3.0},
    "timm ViT, no biases of q, k, v": {"qkv_bias": False},
    "timm ViT, LayerScale": {"init_values": 0.1},
    "timm ViT, q/k norm": {"qk_norm": True},
    "timm ViT, pre-norm (CLIP's)": {"pre_norm": True},
    "timm ViT, four registers": {"reg_tokens": 4},
    "timm ViT, registers, positions for patches only": {"reg_tokens": 4, "no_embed_class": True},
    "timm ViT, no cls token, mean of patches": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "timm DeiT-III (LayerScale, positions for patches only)": {"init_values": 0.1, "no_embed_class": True},
    "timm ViT with attention pooling (SigLIP)": {"class_token": False, "global_pool": "map"},
}
for _name, _options in _VIT_KINDS.items():

    @case(_name)
    def _(folder: Path, options: dict[str, Any] = _options) -> Written:
        model = vit(**options)
        return written(folder / "model.safetensors", model.state_dict(), model)


@case("timm DeiT, distilled")
def _(folder: Path) -> Written:
    model = vit(kind=VisionTransformerDistilled)
    return written(folder / "deit.pth", {"model": model.state_dict()}, model)


@case("timm training checkpoint with EMA")
def _(folder: Path) -> Written:
    plain, average = vit(0), vit(1)
    content = {"epoch": 3, "arch": "vit", "state_dict": plain.state_dict(), "state_dict_ema": average.state_dict(),
               "metric": 50.0, "args": argparse.Namespace(mean=None, std=None)}  # fmt: skip
    return written(folder / "model_best.pth.tar", content, average)


@case("timm hub folder with config.json (mean, std)")
def _(folder: Path) -> Written:
    model = vit()
    config = {"architecture": "vit", "num_features": 64, "pretrained_cfg": {"mean": [0.48, 0.46, 0.41],
              "std": [0.27, 0.26, 0.28], "input_size": [3, IMAGE, IMAGE]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    mean, std = (torch.tensor(config["pretrained_cfg"][n]).view(3, 1, 1) for n in ("mean", "std"))  # type: ignore[index]
    written(folder / "model.safetensors", model.state_dict())
    return Written(folder, None, lambda x: model((x - mean) / std))


@case("shards with an index.json")
def _(folder: Path) -> Written:
    model = vit()
    names = list(model.state_dict())
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, some in parts.items():
        save_file({name: model.state_dict()[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Written(folder / "model.safetensors.index.json", model.forward_features, model)


@case("DistributedDataParallel (module.)")
def _(folder: Path) -> Written:
    model = vit()
    best = torch.tensor(71.0)
    return written(folder / "a.pth", {"state_dict": prefixed("module.", model.state_dict()), "best_acc1": best}, model)


@case("torch.compile, checkpointed and FSDP blocks")
def _(folder: Path) -> Written:
    model = vit()
    words = ("_orig_mod", "_checkpoint_wrapped_module._fsdp_wrapped_module")
    state = {}
    for name, tensor in model.state_dict().items():
        first, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        state[f"{first}.{number}.{words[int(number) % 2]}.{inside}" if first == "blocks" else name] = tensor
    return written(folder / "a.pth", state, model)


@case("torch's AveragedModel")
def _(folder: Path) -> Written:
    model = vit()
    return written(folder / "a.pth", torch.optim.swa_utils.AveragedModel(model).state_dict(), model)


@case("Lightning (state_dict, hyper_parameters)")
def _(folder: Path) -> Written:
    model = vit()
    content = {"state_dict": prefixed("model.", model.state_dict()), "hyper_parameters": {"lr": 1e-3}, "loops": {}}
    return written(folder / "a.ckpt", content, model)


@case("CIFAR scripts (net)")
def _(folder: Path) -> Written:
    model = vit()
    return written(folder / "a.pth", {"net": model.state_dict(), "acc": 93.1}, model)


@case("RobustBench (normalisation in front)")
def _(folder: Path) -> Written:
    model = vit()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    state = {"normalize.mean": mean, "normalize.std": std} | prefixed("model.", model.state_dict())
    return Written(written(folder / "a.pt", state).path, None, lambda x: model((x - mean) / std))


@case("MAE, encoder (mae_pretrain)")
def _(folder: Path) -> Written:
    model = vit(num_classes=0)
    return written(folder / "mae_pretrain.pth", {"model": model.state_dict()}, model)


@case("MAE, encoder and decoder (mae_visualize)")
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = shaken(masked_vit(32, 8, 3, 64, 2, 1, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)).eval()
    return written(folder / "mae_visualize.pth", {"model": to_files(model, model.state_dict())})


@case("MAE, fine-tuned")
def _(folder: Path) -> Written:
    model = vit(global_pool="avg")
    args = argparse.Namespace(global_pool=True, input_size=IMAGE, output_dir=Path("/out"))
    return written(folder / "mae_finetuned.pth", {"model": model.state_dict(), "args": args, "epoch": 9}, model)


@case("MIMIR authors, pre-trained")
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = shaken(masked_vit(32, 8, 3, 64, 2, 1, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=16)).eval()
    args = argparse.Namespace(model="mae_vit", norm_pix_loss=True, input_size=IMAGE)
    content = {"model": to_files(model, model.state_dict()), "optimizer": {"state": {}}, "epoch": 799, "args": args}
    return written(folder / "checkpoint-799.pth", content)


@case("MIMIR authors, released classifier (module.base_model.)")
def _(folder: Path) -> Written:
    model = vit(global_pool="avg")
    return written(folder / "a.pth", {"model_state_dict": prefixed("module.base_model.", model.state_dict())}, model)


def two_encoders(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.zeros(8, 64), "head.last_layer.weight_v": torch.zeros(8, 8)}
    return {"student": prefixed("module.", prefixed("backbone.", second) | head),
            "teacher": prefixed("backbone.", first) | head, "epoch": 3}  # fmt: skip


@case("DINO, teacher and student")
def _(folder: Path) -> Written:
    teacher, student = vit(0, num_classes=0), vit(1, num_classes=0)
    return written(folder / "dino.pth", two_encoders(teacher.state_dict(), student.state_dict()), teacher)


@case("iBOT, teacher and student")
def _(folder: Path) -> Written:
    teacher, student = vit(0, num_classes=0), vit(1, num_classes=0)
    masked = {"masked_embed": torch.zeros(1, 64)}
    content = two_encoders(teacher.state_dict() | masked, student.state_dict() | masked)
    return written(folder / "ibot.pth", content, teacher)


@case("DINOv2")
def _(folder: Path) -> Written:
    model = vit(num_classes=0, init_values=0.1)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 64)}
    return written(folder / "dinov2.pth", state, model)


@case("DINOv2 with registers")
def _(folder: Path) -> Written:
    model = vit(num_classes=0, init_values=0.1, reg_tokens=4, no_embed_class=True)
    state = dict(model.state_dict())
    row = torch.randn(1, 1, 64)  # theirs adds it to the cls token
    state |= {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 64),
              "cls_token": state["cls_token"] - row, "pos_embed": torch.cat([row, state["pos_embed"]], 1)}  # fmt: skip
    return written(folder / "dinov2_reg4.pth", state, model)


@case("MoCo v3 (base and momentum encoder)")
def _(folder: Path) -> Written:
    model = vit(num_classes=0, embed_dim=384, num_heads=12)
    projector = {"head.0.weight": torch.zeros(8, 384), "head.1.weight": torch.zeros(8)}
    base = prefixed("module.base_encoder.", model.state_dict() | projector)
    other = {name.replace("base", "momentum"): tensor + 1 for name, tensor in base.items()}
    content = {"epoch": 300, "arch": "vit_small", "state_dict": other | base}
    return written(folder / "vit-s-300ep.pth.tar", content, model)


@case("solo-learn (backbone and momentum_backbone)")
def _(folder: Path) -> Written:
    model = vit(num_classes=0)
    state = prefixed("momentum_backbone.", vit(1, num_classes=0).state_dict())
    return written(folder / "a.ckpt", {"state_dict": state | prefixed("backbone.", model.state_dict())}, model)


def swin(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (2, 4, 8),
             "window_size": 4, "num_classes": CLASSES}  # fmt: skip
    return shaken(SwinTransformer(**(sizes | options))).eval()


def microsoft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merging at the end of a stage, and the tables beside."""
    old = {}
    for name, tensor in tensors.items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        old[name.replace("head.fc.", "head.")] = tensor
    return old | {"layers.0.blocks.1.attn_mask": torch.zeros(1), "layers.0.blocks.0.attn.relative_position_index":
                  torch.zeros(16, 16, dtype=torch.int64)}  # fmt: skip


@case("timm Swin")
def _(folder: Path) -> Written:
    model = swin()
    return written(folder / "swin.pth", model.state_dict(), model)


@case("Microsoft's Swin (and timm's up to 0.6)")
def _(folder: Path) -> Written:
    model = swin()
    return written(folder / "swin.pth", {"model": microsoft(model.state_dict())}, model)


@case("SimMIM, Swin")
def _(folder: Path) -> Written:
    model = swin(num_classes=0)
    state = prefixed("encoder.", microsoft(model.state_dict()) | {"mask_token": torch.zeros(1, 1, 32)})
    decoder = {"decoder.0.weight": torch.zeros(192, 128, 1, 1), "decoder.0.bias": torch.zeros(192)}
    return written(folder / "simmim.pth", {"model": state | decoder}, model)


@case("timm ConvNeXt")
def _(folder: Path) -> Written:
    model = shaken(ConvNeXt(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), num_classes=CLASSES)).eval()
    content = {"model": model.state_dict(), "args": {"img_size": 64}}
    return Written(written(folder / "convnext.pth", content).path, None, model)


@case("timm CaiT")
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = shaken(Cait(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=CLASSES)).eval()
    return written(folder / "cait.pth", {"model": prefixed("module.", model.state_dict())}, model)


@case("timm XCiT")
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = Xcit(img_size=64, patch_size=16, embed_dim=96, depth=4, num_heads=4, num_classes=CLASSES, tokens_norm=True)
    content = {"model": shaken(model).state_dict(), "args": argparse.Namespace(input_size=64)}
    return Written(written(folder / "xcit.pth", content).path, None, model.eval())


@case("timm ConViT")
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = shaken(
        ConVit(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=4, local_up_to_layer=3, num_classes=CLASSES)
    ).eval()
    return written(folder / "convit.pth", model.state_dict(), model)


_REFUSED: dict[str, Callable[[], nn.Module]] = {
    "timm BEiT": lambda: Beit(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1),
    "timm EVA-02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1),
    "timm Swin v2": lambda: timm.create_model("swinv2_tiny_window8_256", depths=(1, 1), embed_dim=32, num_heads=(1, 2)),
    "timm ConvNeXt v2": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), use_grn=True, ls_init_value=None),
    "timm ViT with relative positions": lambda: timm.create_model(
        "vit_relpos_small_patch16_224", depth=1, embed_dim=64, num_heads=1
    ),
    "timm ResNet": lambda: timm.create_model("test_resnet"),
}
for _name, _build in _REFUSED.items():

    @case(_name)
    def _(folder: Path, build: Callable[[], nn.Module] = _build) -> Written:
        return written(folder / "other.pth", {"model": build().state_dict()})


@case("PEFT's LoRA beside a ViT")
def _(folder: Path) -> Written:
    state = vit().state_dict() | {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 64)}
    return written(folder / "lora.pth", state)


def hub_folder(folder: Path, model: Any, logits: bool, scale: float = 1.0, **processor: Any) -> Written:
    """transformers' folder, with a processor that says ImageNet's statistics of images in [0, `scale`]."""
    mean, std = ([scale * value for value in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = shaken(model).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std} | processor))
    m, s = (torch.tensor(values).view(3, 1, 1) / scale for values in (mean, std))
    if logits:
        return Written(folder, None, lambda x: model((x - m) / s).logits)
    return Written(folder, lambda x: model((x - m) / s).last_hidden_state)


def _hf_sizes(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
            "image_size": IMAGE, "patch_size": 8, "num_labels": CLASSES, "hidden_dropout_prob": 0.0} | more  # fmt: skip


@case("transformers ViT, classifier", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    return hub_folder(folder, transformers.ViTForImageClassification(transformers.ViTConfig(**_hf_sizes())), True)


@case("transformers ViT, tanh GELU", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**_hf_sizes(hidden_act="gelu_pytorch_tanh"))
    return hub_folder(folder, transformers.ViTModel(config, add_pooling_layer=False), False)


@case("transformers ViT, quick GELU, images in [0, 255]", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**_hf_sizes(hidden_act="quick_gelu")))
    return hub_folder(folder, model, True, 255.0, do_rescale=False)


@case("transformers ViT, images in [0, 2]", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**_hf_sizes(hidden_act="gelu_python")))
    return hub_folder(folder, model, True, 2.0, rescale_factor=2 / 255)


@case("transformers DeiT, one head", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    return hub_folder(folder, transformers.DeiTForImageClassification(transformers.DeiTConfig(**_hf_sizes())), True)


@case("transformers ViT, state dict of a live model", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**_hf_sizes(num_attention_heads=1, layer_norm_eps=1e-6))
    model = shaken(transformers.ViTForImageClassification(config)).eval()
    torch.save(model.state_dict(), folder / "live.pth")
    return Written(folder / "live.pth", None, lambda x: model(x).logits)


@case("transformers DeiT, distilled", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**_hf_sizes()))
    return hub_folder(folder, model, True)


@case("transformers ViTMAE", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 128, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 16,
               "decoder_intermediate_size": 512}  # fmt: skip
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**_hf_sizes(**decoder, norm_pix_loss=True)))
    return Written(hub_folder(folder, model, False).path)


@case("transformers DINOv2", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    return hub_folder(folder, transformers.Dinov2Model(transformers.Dinov2Config(**_hf_sizes())), False)


@case("transformers DINOv2 with registers", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(**_hf_sizes())
    return hub_folder(folder, transformers.Dinov2WithRegistersModel(config), False)


@case("transformers Swin", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
        num_labels=CLASSES,
    )  # fmt: skip
    return hub_folder(folder, transformers.SwinForImageClassification(config), True)


@case("transformers ConvNeXt", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(image_size=64, num_labels=CLASSES, layer_norm_eps=0.1)
    return hub_folder(folder, transformers.ConvNextForImageClassification(config), True)


@case("transformers Swin, eps 1e-3", hugging_face=True)
def _(folder: Path) -> Written:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
        layer_norm_eps=1e-3,
    )  # fmt: skip
    return Written(hub_folder(folder, transformers.SwinForImageClassification(config), True).path)


@case("transformers BEiT", hugging_face=True)
def _(folder: Path) -> Written:
    torch.manual_seed(0)
    return Written(hub_folder(folder, transformers.BeitModel(transformers.BeitConfig(**_hf_sizes())), False).path)
