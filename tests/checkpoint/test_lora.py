"""LoRA files of each layout: what they change, what is refused, and that nothing stays behind."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.load import load_model, stored_shapes
from ldm.checkpoint.lora import WeightChanges, read_lora
from ldm.errors import InputError
from tests.tiny_models import tiny_config, tiny_weights, write_safetensors

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
RANK = 2
# name in diffusers' or transformers' models -> the weight of SD 1's tiny model
UNET_LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks.0.attentions.0.proj_in": "output_blocks.0.1.proj_in",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
}
TEXT_LAYERS = {
    f"text_model.encoder.layers.1.{layer}": f"transformer.text_model.encoder.layers.1.{layer}"
    for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
}
OPEN_CLIP_LAYERS = {  # and which third of the rows
    "text_model.encoder.layers.1.self_attn.k_proj": ("attn.in_proj_weight", 1),
    "text_model.encoder.layers.1.self_attn.v_proj": ("attn.in_proj_weight", 2),
    "text_model.encoder.layers.1.self_attn.out_proj": ("attn.out_proj.weight", None),
    "text_model.encoder.layers.1.mlp.fc2": ("mlp.c_proj.weight", None),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for version in (1, 2):
        config = tiny_config(version)
        path = write_safetensors(folder / f"tiny{version}.safetensors", tiny_weights(config))
        made[version] = (path, config, stored_shapes(path))
    return made


@pytest.fixture
def model(checkpoints):
    path, config, _ = checkpoints[1]
    return load_model(path, config, "eps")


@pytest.fixture
def shapes(checkpoints):
    return checkpoints[1][2]


def factors(shape, seed, rank=RANK):
    """Random factors for a weight of that shape, and their product."""
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=random)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=random)
    return down, up, (up.flatten(1) @ down.flatten(1)).view(shape)


def all_factors(shapes):
    """Layer -> (weight's name, factors), for the U-Net and for the text encoder."""
    parts = []
    for layers, prefix in ((UNET_LAYERS, UNET), (TEXT_LAYERS, TEXT)):
        names = {layer: f"{prefix}{ours}.weight" for layer, ours in layers.items()}
        parts.append({n: (w, *factors(shapes[w], len(n))) for n, w in names.items()})
    return parts


def kohya(unet, text, alpha):
    tensors = {}
    for prefix, layers in (("lora_unet_", unet), ("lora_te_", text)):
        for layer, (_, down, up, _) in layers.items():
            name = prefix + layer.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def dotted(unet, text, down_name, up_name, prefix=""):
    tensors = {}
    for part, layers in (("unet.", unet), ("text_encoder.", text)):
        for layer, (_, down, up, _) in layers.items():
            tensors[f"{prefix}{part}{layer}.{down_name}.weight"] = down
            tensors[f"{prefix}{part}{layer}.{up_name}.weight"] = up
    return tensors


def old_processors(unet, text):
    """diffusers' layout before its layers had LoRAs of their own; attention only."""
    tensors = {}
    for layer, (_, down, up, _) in unet.items():
        if ".attn" in layer:
            block, _, place = layer.removesuffix(".0").rpartition(".")
            tensors[f"unet.{block}.processor.{place}_lora.down.weight"] = down
            tensors[f"unet.{block}.processor.{place}_lora.up.weight"] = up
    for layer, (_, down, up, _) in text.items():
        if "self_attn" in layer:
            name = layer.replace("q_proj", "to_q").replace("out_proj", "to_out")
            tensors[f"text_encoder.{name}_lora.down.weight"] = down
            tensors[f"text_encoder.{name}_lora.up.weight"] = up
    return tensors


LAYOUTS = {
    "kohya": lambda unet, text: kohya(unet, text, None),
    "peft": lambda unet, text: dotted(unet, text, "lora_A", "lora_B"),
    "peft_adapter": lambda unet, text: dotted(
        unet, text, "lora_A.default", "lora_B.default", "base_model.model."
    ),
    "diffusers": lambda unet, text: {
        **dotted(unet, {}, "lora.down", "lora.up"),
        **dotted({}, text, "lora_linear_layer.down", "lora_linear_layer.up"),
    },
    "flat_text": lambda unet, text: {
        name.replace("text_encoder.text_model.", "text_encoder."): tensor
        for name, tensor in dotted(unet, text, "lora_A", "lora_B").items()
    },
    "unet_alone": lambda unet, text: {
        name.removeprefix("unet."): tensor
        for name, tensor in dotted(unet, {}, "lora_A", "lora_B").items()
    },
    "processors": old_processors,
}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def write(folder, tensors, metadata=None, name="style.safetensors"):
    path = folder / name
    tensors = {n: t.clone().contiguous() for n, t in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path


# --- what is changed --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["style.safetensors", "style.pt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_changes_its_layers_and_comes_off(model, shapes, tmp_path, layout, name):
    unet, text = all_factors(shapes)
    tensors = LAYOUTS[layout](unet, text)
    lora = read_lora(write(tmp_path, tensors, name=name), 0.5, shapes)
    assert len(lora.changes) == len(tensors) / 2
    before, changes = weights_of(model), WeightChanges(model)
    changes.set([lora])
    after = weights_of(model)
    deltas = {weight: delta for weight, _, _, delta in (*unet.values(), *text.values())}
    for change in lora.changes:
        weight = change.place.name
        torch.testing.assert_close(after[weight], before[weight] + 0.5 * deltas[weight])
    assert changed(before, after) == {change.place.name for change in lora.changes}
    if layout not in ("unet_alone", "processors"):
        assert changed(before, after) == set(deltas)
    changes.set([])
    assert not changed(before, weights_of(model))


def test_text_layers_of_open_clip_are_rows_of_fused_ones(checkpoints, tmp_path):
    path, config, shapes = checkpoints[2]
    tensors, expected = {}, {}
    for layer, (ours, third) in OPEN_CLIP_LAYERS.items():
        name = f"{TEXT}model.transformer.resblocks.1.{ours}"
        rows = shapes[name][0] // (1 if third is None else 3)
        down, up, delta = factors((rows, shapes[name][1]), len(layer) + (third or 0))
        key = "lora_te_" + layer.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        total = expected.setdefault(name, torch.zeros(shapes[name]))
        total[slice(None) if third is None else slice(third * rows, (third + 1) * rows)] += delta
    model = load_model(path, config, "eps")
    before, changes = weights_of(model), WeightChanges(model)
    changes.set([read_lora(write(tmp_path, tensors), 1, shapes)])
    after = weights_of(model)
    assert changed(before, after) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(after[name], before[name] + delta)
    changes.set([])
    assert not changed(before, weights_of(model))


def test_names_of_upstreams_layers_are_understood(shapes, tmp_path):
    down, up, _ = factors(shapes[f"{UNET}middle_block.1.proj_in.weight"], 0)
    key = "lora_unet_middle_block_1_proj_in"
    path = write(tmp_path, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    (change,) = read_lora(path, 1, shapes).changes
    assert change.place.name == f"{UNET}middle_block.1.proj_in.weight"


def test_linear_factors_fit_a_convolution_of_one_pixel(model, shapes, tmp_path):
    """SD 1's proj_in is such a convolution, and some files have matrices for it."""
    name = f"{UNET}middle_block.1.proj_in.weight"
    down, up, delta = factors(shapes[name], 0)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_down.weight": down[..., 0, 0], f"{key}.lora_up.weight": up[..., 0, 0]}
    before = weights_of(model)
    WeightChanges(model).set([read_lora(write(tmp_path, tensors), 1, shapes)])
    torch.testing.assert_close(weights_of(model)[name], before[name] + delta)


def test_alpha_scales(shapes, tmp_path):
    path = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    assert {change.scale for change in read_lora(path, 1, shapes).changes} == {1 / RANK}
    path = write(tmp_path, kohya(*all_factors(shapes), alpha=None))
    assert {change.scale for change in read_lora(path, 1, shapes).changes} == {1.0}


def test_scales_in_diffusers_metadata(shapes, tmp_path):
    said = {
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn2.to_k": 1},
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    tensors = LAYOUTS["peft"](*all_factors(shapes))
    path = write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(said)})
    scales = {change.down: change.scale for change in read_lora(path, 1, shapes).changes}
    for name, scale in scales.items():
        expected = 3 / math.sqrt(RANK) if name.startswith("text") else 6 / RANK
        assert scale == pytest.approx(1 / RANK if "attn2.to_k" in name else expected)


def test_several_add_up_and_the_next_set_replaces_them(model, shapes, tmp_path):
    unet, text = all_factors(shapes)
    first = write(tmp_path, kohya(unet, {}, None), name="first.safetensors")
    second = write(tmp_path, kohya(unet, text, None), name="second.safetensors")
    before, changes = weights_of(model), WeightChanges(model)
    changes.set([read_lora(first, 0.25, shapes), read_lora(second, -1, shapes)])
    after = weights_of(model)
    for factor, layers in ((-0.75, unet), (-1, text)):
        for weight, _, _, delta in layers.values():
            torch.testing.assert_close(after[weight], before[weight] + factor * delta)
    changes.set([read_lora(first, 1, shapes)])
    assert changed(before, weights_of(model)) == {weight for weight, *_ in unet.values()}
    changes.set([read_lora(second, 0, shapes)])
    assert not changed(before, weights_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_come_back_to_the_bit(checkpoints, tmp_path, dtype):
    path, config, shapes = checkpoints[1]
    model = load_model(path, config, "eps", dtype=dtype)
    model.model.to(memory_format=torch.channels_last)
    before, changes = weights_of(model), WeightChanges(model)
    layout = [p.stride() for p in model.parameters()]
    file = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    for weight in (0.7, -2.0):
        changes.set([read_lora(file, weight, shapes)])
        assert changed(before, weights_of(model))
    assert {p.dtype for p in model.parameters()} == {dtype}
    changes.set([])
    assert not changed(before, weights_of(model))
    assert [p.stride() for p in model.parameters()] == layout


def test_summary(shapes, tmp_path):
    path = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    assert read_lora(path, 0.8, shapes).summary() == (
        "LoRA style.safetensors: weight 0.8, rank 2, 6 layers of the U-Net and 3 layers of the "
        "text encoder"
    )


# --- what is refused --------------------------------------------------------------------------

KEY = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{KEY}.hada_w1_a", "a LoHa"),
        (f"{KEY}.lokr_w1", "a LoKr"),
        (f"{KEY}.dora_scale", "a DoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "a DoRA"),
        (f"{KEY}.oft_blocks", "an OFT"),
        (f"{KEY}.a1.weight", "a GLoRA"),
        (f"{KEY}.on_input", r"an \(IA\)\^3"),
        (f"{KEY}.lora_mid.weight", "a LoCon with a Tucker core"),
        (f"{KEY}.diff", "one with whole differences"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "one for FLUX"),
        ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "one for a transformer"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "one for SDXL"),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_k.lora_up.weight",
            "one for SDXL",
        ),
    ],
)
def test_other_kinds_are_refused_by_name(shapes, tmp_path, name, kind):
    path = write(tmp_path, {name: torch.ones(2, 2)})
    with pytest.raises(InputError, match=f"style.safetensors is {kind}"):
        read_lora(path, 1, shapes)


def test_a_checkpoint_is_no_lora(checkpoints):
    path, _, shapes = checkpoints[1]
    with pytest.raises(InputError, match="is no LoRA: it has no lora_down"):
        read_lora(path, 1, shapes)


def fitting(shapes):
    """A file that fits, a layer in it, and the names of the layer's factors."""
    tensors = kohya(*all_factors(shapes), alpha=1)
    key = "lora_unet_up_blocks_0_attentions_0_proj_in"
    down, up = f"{key}.lora_down.weight", f"{key}.lora_up.weight"
    return tensors, key, down, up


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k, d, u: t.pop(u), "is incomplete: lora_unet_up_blocks_0_attentions_0_proj_in"),
        (lambda t, k, d, u: t.update({u: torch.ones(7, RANK)}), "does not fit the model: lora_un"),
        (lambda t, k, d, u: t.update({d: torch.ones(RANK, 7)}), "was made for another model"),
        (lambda t, k, d, u: t.update({d: torch.ones(())}), "was made for another model"),
        (
            lambda t, k, d, u: t.update({d: torch.ones(0, 32), u: torch.ones(64, 0)}),
            "another model",
        ),
        (lambda t, k, d, u: t.update({f"{k}.alpha": torch.ones(2)}), "alpha is not a number"),
        (lambda t, k, d, u: t.update({f"{k}.alpha": torch.tensor(math.inf)}), "is not a number"),
        (lambda t, k, d, u: t.update({"spam.alpha": torch.ones(())}), "1 of 28 tensors have no"),
        (
            lambda t, k, d, u: t.update({"spam": torch.ones(())}),
            "have no place in it, such as spam",
        ),
        (
            lambda t, k, d, u: t.update(
                {"lora_unet_spam.lora_down.weight": t[d], "lora_unet_spam.lora_up.weight": t[u]}
            ),
            "have no place in it, such as lora_unet_spam.lora_down.weight",
        ),
    ],
)
def test_files_that_do_not_fit(shapes, tmp_path, change, words):
    tensors, *names = fitting(shapes)
    change(tensors, *names)
    with pytest.raises(InputError, match=words):
        read_lora(write(tmp_path, tensors), 1, shapes)


def test_files_of_the_other_family_do_not_fit(shapes, tmp_path):
    """The families' contexts have different widths, which those of the small models have not."""
    path = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    wider = {n: (s[0], 24) if n.endswith("attn2.to_k.weight") else s for n, s in shapes.items()}
    with pytest.raises(InputError, match="was made for another model"):
        read_lora(path, 1, wider)


def test_weights_must_be_numbers(shapes, tmp_path):
    path = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    with pytest.raises(InputError, match="weight nan of LoRA"):
        read_lora(path, math.nan, shapes)
    with pytest.raises(InputError, match="is a folder"):
        read_lora(tmp_path, 1, shapes)


def test_bundled_embeddings_are_named_and_ignored(shapes, tmp_path, caplog):
    tensors = kohya(*all_factors(shapes), alpha=1)
    tensors["bundle_emb.cat.string_to_param.*"] = torch.ones(2, 16)
    lora = read_lora(write(tmp_path, tensors), 1, shapes)
    assert len(lora.changes) == 9
    assert "carries embeddings along (bundle_emb.cat.string_to_param.*)" in caplog.text
