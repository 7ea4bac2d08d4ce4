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
    "named_adapter": lambda unet, text: dotted(unet, text, "lora_A.default_0", "lora_B.default_0"),
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


def test_alpha_in_a_pickle_may_be_a_plain_number(shapes, tmp_path):
    tensors = kohya(*all_factors(shapes), alpha=None)
    for alpha in (1, 1.0):
        numbers = {n.replace("lora_up.weight", "alpha"): alpha for n in tensors if "_up." in n}
        torch.save({**tensors, **numbers, "epoch": 3, "a.b": 2**70}, tmp_path / "style.pt")
        found = read_lora(tmp_path / "style.pt", 1, shapes).changes
        assert {change.scale for change in found} == {1 / RANK}


def test_two_adapters_in_one_file_are_refused(shapes, tmp_path):
    first, second = (
        dotted(*all_factors(shapes), f"lora_A.{name}", f"lora_B.{name}") for name in ("a", "b")
    )
    with pytest.raises(InputError, match=r"18 of 36 tensors have no place .*lora_A\.b"):
        read_lora(write(tmp_path, first | second), 1, shapes)


def test_a_layer_under_two_names_is_refused(shapes, tmp_path):
    """Which of both holds, or whether both do, nobody knows."""
    both = kohya(*all_factors(shapes), 1) | dotted(*all_factors(shapes), "lora_A", "lora_B")
    with pytest.raises(InputError, match="has one layer twice, as"):
        read_lora(write(tmp_path, both), 1, shapes)


def test_scales_in_diffusers_metadata(shapes, tmp_path):
    said = {
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn2.to_k": 1},
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    tensors = LAYOUTS["peft"](*all_factors(shapes))
    path = write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(said)})
    scales = {change.tensors["down"]: change.scale for change in read_lora(path, 1, shapes).changes}
    for name, scale in scales.items():
        expected = 3 / math.sqrt(RANK) if name.startswith("text") else 6 / RANK
        assert scale == pytest.approx(1 / RANK if "attn2.to_k" in name else expected)


def test_scales_in_the_metadata_of_a_unet_alone(shapes, tmp_path):
    """diffusers' U-Net writes its adapter without the names of a pipeline's parts."""
    tensors = {
        name.removeprefix("unet."): tensor
        for name, tensor in dotted(*all_factors(shapes), "lora_A", "lora_B").items()
        if name.startswith("unet.")
    }
    said = {"lora_alpha": 6, "alpha_pattern": {"attn2.to_k": 1}}
    path = write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(said)})
    for change in read_lora(path, 1, shapes).changes:
        assert change.scale == (1 if "attn2.to_k" in change.place.name else 6) / RANK


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


# --- other kinds ------------------------------------------------------------------------------

LINEAR = "middle_block.1.transformer_blocks.0.attn1.to_q"
CONV = "input_blocks.1.0.in_layers.2"
THEIRS = {
    LINEAR: "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV: "down_blocks.0.resnets.0.conv1",
}


def made(kind, shape, random):
    """The tensors of a layer of 2 ranks, and, written out, what they add to its weight."""
    n_out, n_in, *kernel = shape

    def new(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    def core(t, a, b):
        return sum(
            t[p, q] * a[p][:, None, None, None] * b[q][None, :, None, None]
            for p in range(2)
            for q in range(2)
        )

    if kind == "tucker LoCon":
        down, mid, up = new(2, n_in, 1, 1), new(2, 2, *kernel), new(n_out, 2, 1, 1)
        names = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
        return names, core(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])
    if kind == "LoHa":
        a1, b1, a2, b2 = (new(*s) for s in [(n_out, 2), (2, shape[1:].numel())] * 2)
        names = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        return names, ((a1 @ b1) * (a2 @ b2)).reshape(shape)
    if kind == "tucker LoHa":
        names, product = {}, 1.0
        for i in "12":
            t, a, b = new(2, 2, *kernel), new(2, n_out), new(2, n_in)
            names |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            product = product * core(t, a, b)
        return names, product
    if kind.endswith("LoKr"):
        k1, a, b = new(2, 4), new(n_out // 2, 2), new(2, shape[1:].numel() // 4)
        k2 = (a @ b).reshape(n_out // 2, n_in // 4, *kernel)
        names = {"lokr_w2": k2} if kind == "whole LoKr" else {"lokr_w2_a": a, "lokr_w2_b": b}
        if kind == "tucker LoKr":
            t, a, b = new(2, 2, *kernel), new(2, n_out // 2), new(2, n_in // 4)
            names, k2 = {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}, core(t, a, b)
        names["lokr_w1"] = k1
        spread = k1.repeat_interleave(n_out // 2, 0).repeat_interleave(n_in // 4, 1)
        tiled = k2.repeat(2, 4, *[1] * len(kernel))
        return names, spread.reshape(*spread.shape, *[1] * len(kernel)) * tiled
    diff = new(*shape)
    return {"diff": diff}, diff


@pytest.mark.parametrize("layer", [LINEAR, CONV])
@pytest.mark.parametrize(
    "kind",
    [
        *("tucker LoCon", "LoHa", "tucker LoHa", "LoKr", "tucker LoKr", "whole LoKr"),
        "difference",
    ],
)
def test_other_kinds_add_what_their_papers_say(model, shapes, tmp_path, kind, layer):
    shape = torch.Size(shapes[f"{UNET}{layer}.weight"])
    if kind.startswith("tucker") and layer == LINEAR:
        pytest.skip("only convolutions have a core")
    names, added = made(kind, shape, torch.Generator().manual_seed(1))
    key = "lora_unet_" + THEIRS[layer].replace(".", "_")
    tensors = {f"{key}.{name}": tensor.float() for name, tensor in names.items()}
    tensors[f"{key}.alpha"] = torch.tensor(1.0)
    before = weights_of(model)
    lora = read_lora(write(tmp_path, tensors), 0.5, shapes)
    WeightChanges(model).set([lora])
    scale = 1 if kind in ("whole LoKr", "difference") else 1 / 2  # alpha over the rank
    name = f"{UNET}{layer}.weight"
    expected = before[name] + (0.5 * scale * added).float()
    torch.testing.assert_close(weights_of(model)[name], expected, rtol=1e-4, atol=1e-4)
    assert changed(before, weights_of(model)) == {name}
    assert "LoCon" in kind or kind.split()[-1] in lora.summary()


@pytest.mark.parametrize("form", ["dora_scale of rows", "dora_scale of columns", "peft"])
@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_dora_gives_the_changed_weight_the_stored_lengths(model, shapes, tmp_path, layer, form):
    name = f"{UNET}{layer}.weight"
    shape = shapes[name]
    down, up, added = factors(shape, 3)
    axis = 1 if form.endswith("columns") else 0
    length = torch.rand(shape[axis], generator=torch.Generator().manual_seed(4)) + 0.5
    stored = length.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if form == "peft":
        key = f"unet.{THEIRS[layer]}"
        tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        tensors[f"{key}.lora_magnitude_vector"] = (
            length if len(shape) == 2 else length.reshape(1, -1, 1, 1)
        )
    else:
        key = "lora_unet_" + THEIRS[layer].replace(".", "_")
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.dora_scale"] = stored
    before, changes = weights_of(model), WeightChanges(model)
    path = write(tmp_path, tensors)
    changes.set([read_lora(path, 1, shapes)])
    after = weights_of(model)[name]
    found = after.movedim(axis, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, length)  # the lengths are the stored ones
    direction = (before[name] + added) * stored
    cosine = torch.cosine_similarity(
        after.movedim(axis, 0).flatten(1), direction.movedim(axis, 0).flatten(1)
    )
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    changes.set([read_lora(path, 0.5, shapes)])
    torch.testing.assert_close(weights_of(model)[name], (before[name] + after) / 2)
    changes.set([])
    assert not changed(before, weights_of(model))
    assert "(DoRA)" in read_lora(path, 1, shapes).summary()


def test_differences_of_norms_and_biases(model, shapes, tmp_path):
    random = torch.Generator().manual_seed(5)
    tensors, expected = {}, {}
    for key, name in {
        "lora_unet_mid_block_attentions_0_norm.w_norm": f"{UNET}middle_block.1.norm.weight",
        "lora_unet_mid_block_attentions_0_norm.b_norm": f"{UNET}middle_block.1.norm.bias",
        "lora_unet_down_blocks_0_resnets_0_conv1.diff_b": f"{UNET}{CONV}.bias",
        "lora_te_text_model_encoder_layers_1_layer_norm1.w_norm": (
            f"{TEXT}transformer.text_model.encoder.layers.1.layer_norm1.weight"
        ),
    }.items():
        tensors[key] = expected[name] = torch.randn(shapes[name], generator=random)
    before = weights_of(model)
    WeightChanges(model).set([read_lora(write(tmp_path, tensors), 2, shapes)])
    after = weights_of(model)
    assert changed(before, after) == set(expected)
    for name, added in expected.items():
        torch.testing.assert_close(after[name], before[name] + 2 * added)


def test_layers_of_rank_0_change_nothing(shapes, tmp_path):
    tensors, key, down, up = fitting(shapes)
    tensors |= {down: torch.ones(0, 64, 1, 1), up: torch.ones(64, 0, 1, 1)}
    lora = read_lora(write(tmp_path, tensors), 1, shapes)
    assert len(lora.changes) == 8
    empty = {n: t for n, t in tensors.items() if n.startswith(f"{key}.")}
    with pytest.raises(InputError, match="changes nothing: all its layers have rank 0"):
        read_lora(write(tmp_path, empty), 1, shapes)


def test_an_inpainting_model_takes_a_change_of_its_latents(shapes, tmp_path):
    """The first layer has five channels more there, behind the four that the file knows."""
    path = write_safetensors(tmp_path / "m.safetensors", tiny_weights(tiny_config(inpainting=True)))
    model = load_model(path, tiny_config(inpainting=True))
    name = f"{UNET}input_blocks.0.0.weight"
    down, up, delta = factors(shapes[name], 0)
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    before = weights_of(model)
    WeightChanges(model).set([read_lora(write(tmp_path, tensors), 1, stored_shapes(path))])
    after = weights_of(model)[name]
    torch.testing.assert_close(after[:, :4], before[name][:, :4] + delta)
    assert torch.equal(after[:, 4:], before[name][:, 4:])


U, T = "input_blocks.1.1.transformer_blocks.0.attn2.to_k", "encoder.layers.1.mlp.fc1"
D = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    "key",
    [
        *(f"lora_unet_{name}" for name in (U.replace(".", "_"), D.replace(".", "_"))),
        *(D, f"unet.{D}", f"unet.{U}", f"diffusion_model.{U}", f"model.diffusion_model.{U}"),
        *(f"base_model.model.{D}", f"lycoris_{D.replace('.', '_')}"),
        *(f"{p}_text_model_{T.replace('.', '_')}" for p in ("lora_te", "lora_te1")),
        *(f"text_encoder.{T}", f"text_encoder.text_model.{T}", f"base_model.model.text_model.{T}"),
        *(f"text_encoders.clip_l.transformer.text_model.{T}", f"clip_l.text_model.{T}"),
    ],
)
@pytest.mark.parametrize("factor", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_every_spelling_of_a_layer(shapes, tmp_path, key, factor):
    is_text = T in key or T.replace(".", "_") in key
    name = f"{TEXT}transformer.text_model.{T}.weight" if is_text else f"{UNET}{U}.weight"
    down, up, _ = factors(shapes[name], 0)
    tensors = {f"{key}.{factor[0]}.weight": down, f"{key}.{factor[1]}.weight": up}
    (change,) = read_lora(write(tmp_path, tensors), 1, shapes).changes
    assert change.place.name == name


# --- strength ---------------------------------------------------------------------------------


def adapter(folder, shapes, **said):
    """An adapter as PEFT saves it: a file of factors, and a configuration beside it."""
    tensors = dotted(*all_factors(shapes), "lora_A", "lora_B")
    tensors = {
        "base_model.model." + name.removeprefix("unet."): tensor
        for name, tensor in tensors.items()
        if name.startswith("unet.")
    }
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **said}))
    return write(folder, tensors, name="adapter_model.safetensors")


def test_strength_is_what_the_adapters_configuration_says(shapes, tmp_path):
    path = adapter(
        tmp_path, shapes, lora_alpha=32, r=8, alpha_pattern={"attn2.to_k": 5, "proj_in": 7}
    )
    for change in read_lora(path, 1, shapes).changes:
        name = change.place.name
        alpha = 5 if "attn2.to_k" in name else 7 if "proj_in" in name else 32
        assert change.scale == alpha / RANK
    adapter(tmp_path, shapes, lora_alpha=32, use_rslora=True)
    assert {c.scale for c in read_lora(path, 1, shapes).changes} == {32 / math.sqrt(RANK)}


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "OLoRA", "corda", "loftq"])
def test_an_adapter_of_changed_weights_is_refused(shapes, tmp_path, begun):
    path = adapter(tmp_path, shapes, lora_alpha=RANK, init_lora_weights=begun)
    with pytest.raises(InputError, match=f"init_lora_weights is '{begun}'"):
        read_lora(path, 1, shapes)
    for begun in (True, False, "gaussian", "eva"):
        adapter(tmp_path, shapes, lora_alpha=RANK, init_lora_weights=begun)
        assert {change.scale for change in read_lora(path, 1, shapes).changes} == {1.0}


def test_an_adapters_configuration_lies_beside_what_a_link_leads_to(shapes, tmp_path):
    (tmp_path / "run").mkdir()
    link = tmp_path / "style.safetensors"
    link.symlink_to(adapter(tmp_path / "run", shapes, lora_alpha=32))
    assert {change.scale for change in read_lora(link, 1, shapes).changes} == {32 / RANK}


def test_an_adapter_without_its_configuration_is_said(shapes, tmp_path, caplog):
    path = adapter(tmp_path, shapes)
    (tmp_path / "adapter_config.json").unlink()
    assert {change.scale for change in read_lora(path, 1, shapes).changes} == {1.0}
    assert "without its adapter_config.json" in caplog.text


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, whole"])
def test_the_strength_of_pefts_other_kinds(shapes, tmp_path, kind):
    """Their alpha has a name of its own; the rank may be in the configuration alone."""
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    n, _ = shapes[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"]
    low = {"a": (n, RANK), "b": (RANK, n)}
    sizes = {
        "LoHa": {f"hada_w{i}_{side}": low[side] for i in (1, 2) for side in "ab"},
        "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (n // 2, RANK), "lokr_w2_b": (RANK, n // 2)},
        "LoKr, whole": {"lokr_w1": (2, 2), "lokr_w2": (n // 2, n // 2)},
    }[kind]
    said = {"peft_type": kind[:4].upper(), "r": RANK, "alpha": 32}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    tensors = {f"{layer}.{role}": torch.ones(size) for role, size in sizes.items()}
    path = write(tmp_path, tensors, name="adapter_model.safetensors")
    assert [change.scale for change in read_lora(path, 1, shapes).changes] == [32 / RANK]
    said |= {"alpha_pattern": {"attn2.to_q": 8}, "rank_pattern": {"attn2.to_q": 16, "to_k": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    rank = 16 if kind == "LoKr, whole" else RANK  # the others' is that of their tensors
    assert [change.scale for change in read_lora(path, 1, shapes).changes] == [8 / rank]


def test_an_adapters_configuration_is_not_that_of_a_file_beside_it(shapes, tmp_path):
    adapter(tmp_path, shapes, lora_alpha=32)
    path = write(tmp_path, kohya(*all_factors(shapes), None))
    assert {change.scale for change in read_lora(path, 1, shapes).changes} == {1.0}


@pytest.mark.parametrize(
    "said",
    [
        {"lora_alpha": "32"},
        {"lora_alpha": [1]},
        {"lora_alpha": True},
        {"lora_alpha": 1e300},
        {"alpha_pattern": ["a"]},
        {"alpha_pattern": {"a": None}},
        {"alpha_pattern": {"(a+)+$": 1}},
        {"alpha_pattern": {"(a|a)*b": 1}},
        {"alpha_pattern": {".*.*.*.*.*x": 1}},
        {"alpha_pattern": {"a" * 1000: 1}},
        {"alpha_pattern": {"(": 1}},
        {"use_rslora": "yes"},
    ],
)
@pytest.mark.parametrize("is_header", [True, False])
def test_hostile_strengths_are_one_line(shapes, tmp_path, said, is_header):
    path = adapter(tmp_path, shapes, **({} if is_header else said))
    if is_header:
        header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})}
        path = write(tmp_path, kohya(*all_factors(shapes), None), header)
    with pytest.raises(InputError, match=next(iter(said))) as caught:
        read_lora(path, 1, shapes)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["[]", "null", "{", "3", '{"a": 1, "a": 2}'])
def test_a_header_that_is_no_json_is_one_line(shapes, tmp_path, text):
    path = write(tmp_path, kohya(*all_factors(shapes), None), {"lora_adapter_metadata": text})
    with pytest.raises(InputError, match="lora_adapter_metadata"):
        read_lora(path, 1, shapes)


def test_a_file_whose_numbers_are_too_large_is_named_and_comes_off(checkpoints, tmp_path):
    path, config, shapes = checkpoints[1]
    model = load_model(path, config, "eps", dtype=torch.float16)
    file = write(tmp_path, kohya(*all_factors(shapes), alpha=1))
    before = weights_of(model)
    with pytest.raises(InputError, match=r"LoRA style.safetensors at 1e\+06: .* float16"):
        WeightChanges(model).set([read_lora(file, 1e6, shapes)])
    assert not changed(before, weights_of(model))


def test_a_file_of_what_are_no_numbers_is_damaged_and_comes_off(checkpoints, tmp_path):
    path, config, shapes = checkpoints[1]
    model = load_model(path, config, "eps")
    tensors = kohya(*all_factors(shapes), None)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name] = tensors[name] * float("nan")
    before = weights_of(model)
    with pytest.raises(InputError, match=f"style.safetensors is damaged: {name} has values"):
        WeightChanges(model).set([read_lora(write(tmp_path, tensors), 1, shapes)])
    assert not changed(before, weights_of(model))


# --- what is refused --------------------------------------------------------------------------

KEY = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{KEY}.oft_blocks", "an OFT"),
        (f"{KEY}.a1.weight", "a GLoRA"),
        (f"{KEY}.on_input", r"an \(IA\)\^3"),
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
        (lambda t, k, d, u: (t.pop(d), t.pop(u)), "1 of 25 tensors have no place"),
        (lambda t, k, d, u: t.update({d: t[d].bool()}), "is BOOL, and a weight must be"),
        (lambda t, k, d, u: t.update({u: t[u] + 0j}), "is C64, and a weight must be"),
        (lambda t, k, d, u: t.update({f"{k}.lokr_w1": t[u]}), "parts that do not go together"),
        (lambda t, k, d, u: t.update({f"{k}.dora_scale": torch.ones(7, 1)}), "another model"),
        (lambda t, k, d, u: t.update({f"{k}.diff_b": torch.ones(7)}), "another model"),
        (
            lambda t, k, d, u: t.update({"spam\x1b[2J\n.x": torch.ones(())}),
            r"such as spam\\x1b\[2J\\n\.x$",
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
