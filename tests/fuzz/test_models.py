"""Model files, LoRAs and YAMLs with odd tensors, names and values, and damaged bytes."""

import copy
import logging
from collections import Counter

import pytest
import torch
import yaml
from safetensors.torch import save

from ldm.checkpoint.convert import convert
from ldm.checkpoint.embedding import read_embedding
from ldm.checkpoint.load import inspect_checkpoint, load_model, stored_shapes
from ldm.checkpoint.lora import WeightChanges, read_lora
from ldm.config import load_preset
from ldm.modules.tome.config import ToMeConfig
from tests.fuzz.fuzzing import cases, damaged, files_below, json_value, outcome, told, value
from tests.tiny_models import tiny_config, tiny_weights, write_safetensors

UNET = "model.diffusion_model."
TENSORS = [
    *(lambda t: t.int(), lambda t: t.bool(), lambda t: t + 0j, lambda t: t.double()),
    *(lambda t: t[None], lambda t: t.flatten(), lambda t: t[..., :1], lambda t: t * torch.nan),
    *(lambda t: t.new_zeros(()), lambda t: t.new_zeros(0), lambda t: t.new_zeros([1] * 9)),
    *(lambda t: t.to_sparse(), lambda t: torch.empty(t.shape, device="meta")),
    *(lambda t: torch.zeros(1).expand(10**9), lambda t: t.bfloat16(), torch.nn.Parameter),
    *(lambda t: "text", lambda t: None, lambda t: {"a": t}, lambda t: [t], lambda t: 3),
]
NAMES = [
    *(f"{UNET}input_blocks.{n}.0.weight" for n in ("abc", "9" * 30, "-1", "", "0.0", "7")),
    *(
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        f"{UNET}label_emb.0.0.weight",
    ),
    *(f"first_stage_model.{n}" for n in ("decoder.up.x.y", "decoder.up.9999.y", "quantize.x")),
    *(f"cond_stage_model.model.transformer.resblocks.{n}.ln_1.weight" for n in ("zz", "777")),
    *("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", "betas"),
    *("v_pred", "ztsnr", "state_dict", "model_ema.x", "string_to_param", "emb_params", UNET),
    *("", ".", "a\nb", "\x1b[2J", "x" * 600, "module." * 50 + "x", "conditioner.embedders.1.x"),
]
ROLES = """hada_w1_a hada_w1_b hada_t1 lokr_w1 lokr_w2_a lokr_w2_b lokr_t2 dora_scale alpha diff
diff_b w_norm lora_mid.weight lora_magnitude_vector oft_blocks""".split()  # noqa: SIM905 - as names


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Version -> configuration, tensors and file of a small model."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for version in (1, 2):
        config = tiny_config(version)
        weights = tiny_weights(config)
        found[version] = config, weights, write_safetensors(folder / f"{version}.st", weights)
    return found


def odd(tensors, chance):
    """Tensors, of which some are missing, others, or more."""
    tensors = dict(tensors)
    for _ in range(chance.randrange(4)):
        name, kind = chance.choice(list(tensors)), chance.randrange(4)
        if kind < 2 and isinstance(tensors[name], torch.Tensor):
            try:
                tensors[name] = chance.choice(TENSORS)(tensors[name])
            except (RuntimeError, IndexError):  # not every change fits every tensor
                continue
        elif kind == 2 and len(tensors) > 1:
            del tensors[name]
        else:
            shape = chance.choice([(0,), (), (3,), (2, 3, 4, 5), (7, 7)])
            tensors[chance.choice(NAMES)] = torch.ones(shape)
    return tensors


def write(path, tensors, chance):
    """A file of either format; sometimes a damaged one."""
    plain = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    is_safe = all(t.layout == torch.strided and t.numel() < 10**8 for t in plain.values())
    if is_safe and not any(t.is_meta for t in plain.values()) and chance.random() < 0.5:
        data = save(
            {n: t.detach().clone().contiguous() for n, t in plain.items()},
            {
                chance.choice(["prediction_type", "ztsnr", "x"]): value(chance)[:99]
                .encode("utf-8", "ignore")
                .decode()
            },
        )
        path.write_bytes(data)
    else:
        torch.save(chance.choice([tensors, {"state_dict": tensors}]), path)
    if chance.random() < 0.2:
        path.write_bytes(damaged(path.read_bytes(), chance))
    return path


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def uses(path, config, whole, target):
    """What a file can be taken for."""
    return (
        lambda: load_model(path, config),
        lambda: convert(path, target, force=True),
        lambda: inspect_checkpoint(whole, config, vae=path),
        lambda: read_embedding(path, stored_shapes(whole)),
    )


def test_a_model_file_is_used_or_refused(models, tmp_path):
    counts = Counter()
    for number, chance in cases(25):
        version = chance.choice((1, 2))
        config, weights, whole = models[version]
        path = write(tmp_path / "m.ckpt", odd(weights, chance), chance)
        before = files_below(tmp_path)
        for action in uses(path, config, whole, tmp_path / "c.safetensors"):
            counts[outcome(action, ("model", number))] += 1
        (tmp_path / "c.safetensors").unlink(missing_ok=True)
        assert files_below(tmp_path) == before
    told("model files", counts)


def test_a_lora_is_added_or_refused(models, tmp_path):
    config, weights, whole = models[1]
    model = load_model(whole, config)
    shapes = stored_shapes(whole)
    changes = WeightChanges(model)
    layers = {  # key in the file -> the weight
        "lora_unet_middle_block_1_proj_in": f"{UNET}middle_block.1.proj_in.weight",
        "lora_unet_input_blocks_1_0_in_layers_2": f"{UNET}input_blocks.1.0.in_layers.2.weight",
        "lora_unet_conv_in": f"{UNET}input_blocks.0.0.weight",
    }
    counts = Counter()
    for number, chance in cases(60):
        tensors = {}
        for key, name in layers.items():
            n_out, *rest = shapes[name]
            tensors[f"{key}.lora_down.weight"] = torch.ones(2, *rest)
            tensors[f"{key}.lora_up.weight"] = torch.ones(n_out, 2, *[1] * (len(rest) - 1))
        if chance.random() < 0.5:
            role = chance.choice(ROLES)
            shape = chance.choice([(), (3,), (0, 0), (2, 2), (2, 2, 3, 3), (64, 1)])
            tensors[f"{chance.choice(list(layers))}.{role}"] = torch.ones(shape)
        path = write(tmp_path / "l.pt", odd(tensors, chance), chance)
        counts[
            outcome(lambda path=path: changes.set([read_lora(path, 1, shapes)]), ("lora", number))
        ] += 1
    changes.set([])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    told("LoRA files", counts)


def mutated(node, chance):
    """Change one value somewhere in nested dicts and lists."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(node[key], dict | list) and chance.random() < 0.8:
            node = node[key]
        elif isinstance(node, dict) and chance.random() < 0.2:
            del node[key]
            return
        else:
            node[key] = chance.choice(
                [json_value(chance), value(chance), {"target": value(chance), "params": {}}]
            )
            return


def write_yaml(path, content, chance):
    text = yaml.safe_dump(content).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(text, chance) if chance.random() < 0.3 else text)


def test_a_configuration_is_used_or_refused(models, tmp_path):
    counts = Counter()
    config, weights, _ = models[1]
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    for number, chance in cases(40):
        whole = copy.deepcopy(config)
        for _ in range(chance.randrange(1, 3)):
            mutated(whole, chance)
        write_yaml(tmp_path / "m.yaml", whole, chance)
        for given in (None, tmp_path / "m.yaml"):
            counts[outcome(lambda given=given: load_model(path, given), ("config", number))] += 1
    told("configurations", counts)


def test_a_preset_is_used_or_refused(tmp_path):
    counts = Counter()
    for number, chance in cases(200):
        preset = {"method": "kth", "k": 4, "apply_to": ["kv"], "rules": [{"min_tokens": 9}]}
        mutated(preset, chance)
        write_yaml(tmp_path / "p.yaml", preset, chance)
        action = lambda: ToMeConfig.from_mapping(  # noqa: E731 - one line a case
            load_preset(tmp_path / "p.yaml", may_be_path=True)
        )
        counts[outcome(action, ("preset", number))] += 1
    told("presets", counts)
