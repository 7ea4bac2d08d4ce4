"""Names of tensors in Stable Diffusion checkpoint files, and what they say about the file.

Pure functions of names, shapes and text: no tensor is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoint.files import StateDict
from ldm.errors import SUPPORTED, InputError

Shape = tuple[int, ...]

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
TEXT_ENCODER = "cond_stage_model."
COMPONENTS = {UNET: "U-Net", FIRST_STAGE: "first stage (VAE)", TEXT_ENCODER: "text encoder"}

TOKENS = "token_embedding.weight"
MAX_ADDED_TOKENS = 10_000

# Some exporters leave out the level `text_model.` of the CLIP tower; sgm has another prefix;
# wrappers of torch (DataParallel, compile) leave levels; VAEs may have diffusers' attention.
_VAE_ATTENTION = r"^(first_stage_model\..*\.attn(?:_1|\.\d+)\.)"
RENAMES = [
    (re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\."), ""),
    (re.compile(r"^conditioner\.embedders\.0\."), TEXT_ENCODER),
    (
        re.compile(
            r"^(cond_stage_model\.transformer\.)(?=(embeddings|encoder|final_layer_norm)\.)"
        ),
        r"\1text_model.",
    ),
    (re.compile(_VAE_ATTENTION + r"(?:to_q|query)\."), r"\1q."),
    (re.compile(_VAE_ATTENTION + r"(?:to_k|key)\."), r"\1k."),
    (re.compile(_VAE_ATTENTION + r"(?:to_v|value)\."), r"\1v."),
    (re.compile(_VAE_ATTENTION + r"(?:to_out\.0|proj_attn)\."), r"\1proj_out."),
    (re.compile(_VAE_ATTENTION + r"group_norm\."), r"\1norm."),
]

# Recomputed from the configuration, because pruned files hold them in half precision.
SCHEDULE = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped"),
        *("posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "denoiser.sigmas"),
    }
)

# Tensors that many files carry and no picture needs.
HARMLESS = re.compile(
    r"""
    v_pred | ztsnr                               # what the U-Net predicts: read elsewhere
    | model_ema\..*                                # running averages: only used when asked for
    | logvar                                     # weight of the training loss
    | first_stage_model\.(loss|model_ema)\..*    # the first stage's own training
    | cond_stage_model\..*\.position_ids         # 0..76, a buffer that is not stored any more
    | cond_stage_model\.model\.attn_mask         # the causal mask, likewise
    # heads of CLIP's contrastive training
    | cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)
    """,
    re.VERBOSE,
)


def canonical_name(name: str) -> str:
    """The name that a model of this project gives to the tensor."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Name in our models -> name in the file; a tensor that needs no renaming wins."""
    stored = list(stored)
    renamed = {canonical_name(name): name for name in stored}
    return renamed | {name: name for name in stored if name in renamed}


def canonical_shapes(weights: StateDict) -> dict[str, Shape]:
    """Name in our models -> shape."""
    return {n: weights.entries[raw].shape for n, raw in canonical_names(weights).items()}


def ema_name(name: str) -> str:
    """Where the running average of the U-Net parameter ``name`` is kept.

    ``model.diffusion_model.out.0.bias`` -> ``model_ema.diffusion_modelout0bias``.

    Source: CompVis ldm/modules/ema.py.
    """
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def has_ema(names: Iterable[str]) -> bool:
    """Whether there are averages, not only the counters that pruned files still hold."""
    return any(name.startswith("model_ema.diffusion_model") for name in names)


def is_weight(name: str) -> bool:
    """Whether a tensor belongs to one of the model's components, and is read for drawing."""
    return name.startswith(tuple(COMPONENTS)) and not is_harmless(name)


def has_encoder(names: Iterable[str]) -> bool:
    """Whether the first stage can encode; some files have its decoder alone."""
    return any(name.startswith(f"{FIRST_STAGE}encoder.") for name in names)


def is_harmless(name: str) -> bool:
    """Whether a tensor that the model has no place for can be left out without a word."""
    return name in SCHEDULE or HARMLESS.fullmatch(name) is not None


# --- other families, refused by name ----------------------------------------------------------

# (pattern of a name, what the file is); the first that is found in any name decides.
OTHER_FAMILIES = [
    (r"(^|[._])lora_|\.(hada|lokr)_w", "a LoRA"),
    (r"^(control_model|control_net|controlnet_)|(^|\.)input_hint_block\.", "a ControlNet"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\.", "a FLUX model"),
    (r"motion_modules\.", "an AnimateDiff motion module"),
    (r"^model\.diffusion_model\..*time_stack\.", "a Stable Video Diffusion model"),
    (r"^conditioner\.embedders\.1\.", "an SDXL model"),
    (r"^(string_to_param|emb_params|clip_[lg])$", "a textual-inversion embedding"),
    (r"^cond_stage_model\.transformer\.attn_layers\.", "a model with a BERT text encoder"),
    (r"^depth_model\.", "a Stable Diffusion 2 depth model"),
    (r"^(embedder\.model|noise_augmentor)\.", "a Stable unCLIP model"),
    (r"^first_stage_model\.quantize\.", "a model with a VQ first stage"),
    (r"(^|\.)(scaled_fp8|scale_weight|weight_scale)$", "a model of scaled 8-bit numbers"),
]
# What a file is that holds no U-Net under upstream's names.
PARTS = [
    (r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.", "a diffusers U-Net in a file of its own"),
    (r"^input_blocks\.0\.0\.", "a U-Net alone"),
    (r"^(encoder|decoder|quant_conv|post_quant_conv)\.", "a VAE in a file of its own"),
    (r"^(text_model|transformer\.text_model|transformer\.resblocks)\.", "a text encoder alone"),
]
UNET_INPUTS = {
    5: "a Stable Diffusion 2 depth model",
    7: "a Stable Diffusion x4 upscaler",
    8: "an instruct-pix2pix model",
}
CONTEXT_SIZES = {2048: "an SDXL model", 1280: "an SDXL refiner"}


def refuse_other_families(shapes: Mapping[str, Shape], where: str) -> None:
    """Stop at files of a kind that this project cannot sample from.

    Args:
        shapes: canonical name -> shape of every tensor.
        where: the file, for the message.

    Raises:
        InputError: it is another kind of file; the message says which.
    """
    patterns = OTHER_FAMILIES + ([] if any(n.startswith(UNET) for n in shapes) else PARTS)
    for pattern, kind in patterns:
        expression = re.compile(pattern)
        if any(expression.search(name) for name in shapes):
            raise InputError(f"{where} is {kind}; {SUPPORTED}")
    special = CONTEXT_SIZES.get(context_size(shapes) or 0)
    special = special or UNET_INPUTS.get(input_channels(shapes) or 0)
    if special is None and f"{UNET}label_emb.0.0.weight" in shapes:
        special = "a Stable unCLIP model"
    if special:
        raise InputError(f"{where} is {special}; {SUPPORTED}")


# --- what the shapes say ----------------------------------------------------------------------


def same_but_for_ones(shape: Shape, wanted: Shape) -> bool:
    """Whether a tensor fills a place as it is or reshaped: they differ in dimensions of 1 alone."""
    plain = [[n for n in one if n != 1] for one in (shape, wanted)]
    return plain[0] == plain[1]


def input_channels(shapes: Mapping[str, Shape]) -> int | None:
    """Input channels of the U-Net; None without one."""
    shape = shapes.get(f"{UNET}input_blocks.0.0.weight")
    return shape[1] if shape and len(shape) == 4 else None


def context_size(shapes: Mapping[str, Shape]) -> int | None:
    """Width of the text vectors that the U-Net's cross-attention reads; None without one."""
    keys = (n for n in shapes if n.startswith(UNET) and n.endswith(".attn2.to_k.weight"))
    return next((shapes[name][1] for name in keys if len(shapes[name]) == 2), None)


def family(shapes: Mapping[str, Shape]) -> str:
    """``sd1``, ``sd1-inpainting``, ``sd2``, ``sd2-inpainting``, or ``custom``."""
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    version = {768: "sd1", 1024: "sd2"}.get(context_size(shapes) or 0)
    kind = {4: "", 9: "-inpainting"}.get(input_channels(shapes) or 0)
    if version is None or kind is None or first[:1] != (320,):
        return "custom"
    return version + kind


def misfit(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str | None:
    """The first thing in a model configuration that contradicts the tensors, or None.

    A quick test that tells the shipped configurations apart without building a model; components
    that the file lacks are not judged.

    Args:
        config: a whole YAML file, plain dicts.
        shapes: canonical name -> shape.

    Raises:
        InputError: the configuration describes no latent-diffusion model.
    """
    try:
        params = config["model"]["params"]
        unet = params["unet_config"]["params"]
        stage = params["first_stage_config"]
        text = params["cond_stage_config"]
        pairs = list(_signature(unet, stage, text, shapes))
        last = shapes.get(f"{UNET}out.2.weight")
        if last and len(last) == 4:
            pairs.append(("channels", params["channels"], last[0]))
    except KeyError as error:
        raise InputError(f"the configuration is no latent-diffusion model: no {error}") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise InputError("the configuration is no latent-diffusion model") from error
    wrong = (pair for pair in pairs if pair[1] != pair[2])
    return next((f"it says {a} for {what}, the file {b}" for what, a, b in wrong), None)


def _signature(
    unet: Mapping[str, Any], stage: Any, text: Any, shapes: Mapping[str, Shape]
) -> Iterable[tuple[str, Any, Any]]:
    """(what, value in the configuration, value in the file) for whatever the file shows."""
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first and len(first) == 4:
        yield "in_channels", unet["in_channels"], first[1]
        yield "model_channels", unet["model_channels"], first[0]
    context = context_size(shapes)
    if context is not None and unet.get("context_dim") is not None:
        said = unet["context_dim"]
        yield "context_dim", said[0] if isinstance(said, list) else said, context
    projections = [n for n in shapes if n.startswith(UNET) and n.endswith(".proj_in.weight")]
    if projections:
        linear = len(shapes[projections[0]]) == 2
        yield "use_linear_in_transformer", bool(unet.get("use_linear_in_transformer")), linear
    count = 1 + max((_number(n, f"{UNET}input_blocks.") for n in shapes), default=-1)
    blocks = unet["num_res_blocks"]
    levels = len(unet.get("channel_mult", (1, 2, 4, 8)))
    if count and isinstance(blocks, int):
        yield "the U-Net's number of input blocks", levels * (blocks + 1), count
    latent = shapes.get(f"{FIRST_STAGE}post_quant_conv.weight")
    if latent and len(latent) == 4 and isinstance(stage, Mapping):
        ddconfig = stage["params"]["ddconfig"]
        yield "embed_dim", stage["params"]["embed_dim"], latent[1]
        levels = 1 + max(_number(n, f"{FIRST_STAGE}decoder.up.") for n in shapes)
        yield "the first stage's number of levels", len(ddconfig["ch_mult"]), levels
    if isinstance(text, Mapping):
        said = "open_clip" if "OpenCLIP" in text["target"] else "CLIP"
        if f"{TEXT_ENCODER}model.ln_final.weight" in shapes:
            yield "the text encoder", said, "open_clip"
        elif f"{TEXT_ENCODER}transformer.text_model.final_layer_norm.weight" in shapes:
            yield "the text encoder", said, "CLIP"


def _number(name: str, prefix: str) -> int:
    """The number that follows ``prefix`` in ``name``; -1 where the name starts otherwise."""
    match = re.match(r"(\d{1,4})\.", name[len(prefix) :]) if name.startswith(prefix) else None
    return int(match[1]) if match else -1


def idle_text_names(names: Iterable[str], text_config: Any) -> set[str]:
    """Tensors of an open_clip text tower that most files store and no computation reads.

    Files converted from diffusers leave them out: the heads of the contrastive training and, with
    ``layer: penultimate``, the last block.
    """
    if not isinstance(text_config, Mapping) or "OpenCLIP" not in text_config["target"]:
        return set()
    tower = f"{TEXT_ENCODER}model."
    blocks = f"{tower}transformer.resblocks."
    names = list(names)
    idle = {f"{tower}text_projection", f"{tower}logit_scale"}
    if (text_config.get("params") or {}).get("layer") == "penultimate":
        last = f"{blocks}{max(_number(name, blocks) for name in names)}."
        idle |= {name for name in names if name.startswith(last)}
    return idle
