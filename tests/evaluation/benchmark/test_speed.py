import itertools
import json
import os
import sys
from contextlib import contextmanager

import pytest
import torch

from ldm.config import load_config, load_preset, preset_names
from ldm.evaluation.benchmark import breakdown as breakdown_module
from ldm.evaluation.benchmark import speed as speed_module
from ldm.evaluation.benchmark import suite as benchmark
from ldm.evaluation.benchmark.breakdown import breakdown
from ldm.evaluation.benchmark.memory import Peak, peak_memory
from ldm.evaluation.benchmark.oracle import FreePlan, oracle
from ldm.evaluation.benchmark.peers import diffusers_config, diffusers_step, diffusers_unet
from ldm.evaluation.benchmark.speed import UPSTREAM_STEPS, Case, Contender, Row, compare, contenders
from ldm.evaluation.benchmark.speed_report import against_upstream, figures, table, write_json
from ldm.evaluation.benchmark.unets import UNets, build_unet, compiled_unet, upstream_unet
from ldm.models.diffusion import captures as captures_module
from ldm.modules.attention import CrossAttention
from ldm.modules.tome.config import ToMeConfig
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")
CASE = Case("tiny", 16, 2, "float32", "sdpa")
MERGING = [name for name in preset_names() if name != "trim_context"]
INPUTS = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 77, 16)


def from_preset(name):
    """A shipped preset, but for the least number of tokens, which a small model lacks."""
    return ToMeConfig.from_mapping({**load_preset(name), "min_tokens": 0})


@pytest.fixture(scope="module")
def unet():
    return build_unet(tiny_config(), torch.float32, CPU)


def attended(unet):
    """Queries and keys of each attention, as (n_queries, n_keys), in one call of the model."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: seen.append((args[0].shape[1], args[args[1] is not None].shape[1]))
        )
        for module in unet.modules()
        if isinstance(module, CrossAttention)
    ]
    with torch.inference_mode():
        unet(*INPUTS)
    for hook in hooks:
        hook.remove()
    return seen


# --- the oracle ---------------------------------------------------------------------------------


def test_a_free_plan_moves_nothing():
    x = torch.randn(2, 6, 3)
    plan = FreePlan(6, 4, groups=torch.empty(0))
    merged = plan.merge(x)
    assert merged.shape == (2, 4, 3)
    assert merged.is_contiguous()
    assert merged.data_ptr() == x.data_ptr()
    assert plan.unmerge(merged).shape == x.shape
    assert plan.unmerge(merged).data_ptr() == x.data_ptr()
    assert plan.log_size() is None


@pytest.mark.parametrize("preset", MERGING)
def test_the_oracle_attends_to_as_many_tokens_and_matches_none(unet, preset, monkeypatch):
    unet.tome.configure(from_preset(preset))
    real = attended(unet)
    with oracle(unet), monkeypatch.context() as patch:
        patch.setattr("ldm.modules.attention.plan_block", None)
        free = attended(unet)
    unet.tome.configure(ToMeConfig())
    plain = attended(unet)
    assert free == real
    assert (free != plain) == (
        preset not in ("birch_schedule", "kv_cap", "hypertile")
    )  # for large ones


def test_the_oracle_leaves_no_trace(unet):
    unet.tome.configure(ToMeConfig.from_mapping({"ratio": 0.5, "apply_to": "block"}))
    with torch.inference_mode():
        before = unet(*INPUTS)
        with oracle(unet):
            unet.tome.begin_run()
            assert not torch.equal(unet(*INPUTS), before)
        unet.tome.begin_run()
        assert torch.equal(unet(*INPUTS), before)
    unet.tome.configure(ToMeConfig())


# --- the breakdown ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        # of the five transformers of the small model three are at full resolution
        # queries are merged apart from keys and values where each has a plan of its own
        ({"ratio": 0.5}, {"match": 3, "merge": 6, "unmerge": 3}),
        ({"ratio": 0.5, "metric": "hidden"}, {"match": 3, "merge": 3, "unmerge": 3}),
        ({"ratio": 0.75, "apply_to": "kv"}, {"match": 3, "merge": 3, "unmerge": 0}),
        ({"ratio": 0.5, "apply_to": ["attn", "mlp"]}, {"match": 3, "merge": 6, "unmerge": 6}),
        ({"ratio": 0.5, "apply_to": "block"}, {"match": 3, "merge": 3, "unmerge": 3}),
        ({"ratio": 0.5, "reuse_layers": True}, {"match": 1, "merge": 6, "unmerge": 3}),
        ({"ratio": 0}, {"match": 0, "merge": 0, "unmerge": 0}),
    ],
)
def test_breakdown_counts_each_part_and_changes_nothing(unet, settings, parts, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(breakdown_module, "perf_counter", lambda: next(clock))
    unet.tome.configure(ToMeConfig.from_mapping(settings))
    with torch.inference_mode():
        plain = unet(*INPUTS)
        unet.tome.begin_run()
        with breakdown(unet, CPU) as seconds:
            assert torch.equal(unet(*INPUTS), plain)
    assert seconds == parts
    assert unet.tome.planner is None
    unet.tome.configure(ToMeConfig())


# --- models and peers ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_build_unet_is_as_the_pipeline_has_it(version):
    unet = build_unet(tiny_config(version), torch.bfloat16, CPU)
    weights = unet.state_dict()
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    conv = unet.input_blocks[0][0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        out = unet(*INPUTS)
    assert 0.01 < out.float().std() < 100
    again = build_unet(tiny_config(version), torch.bfloat16, CPU).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_diffusers_is_told_the_shapes_of_both_families():
    def of(name):
        config = load_config(f"configs/stable-diffusion/{name}.yaml")
        return diffusers_config(config["model"]["params"]["unet_config"]["params"])

    first, second = of("v1-inference"), of("v2-inference-v")
    assert first["block_out_channels"] == second["block_out_channels"] == (320, 640, 1280, 1280)
    assert first["down_block_types"] == (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    assert first["up_block_types"] == ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    assert (first["attention_head_dim"], second["attention_head_dim"]) == (8, [5, 10, 20, 20])
    assert (first["cross_attention_dim"], second["cross_attention_dim"]) == (768, 1024)
    assert (first["use_linear_projection"], second["use_linear_projection"]) == (False, True)


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_takes_our_tensors(version):
    pytest.importorskip("diffusers")
    config = tiny_config(version)
    unet = build_unet(config, torch.float32, CPU)
    peer = diffusers_unet(config["model"]["params"]["unet_config"]["params"], unet)
    ours = {p.data_ptr() for p in unet.parameters()}
    assert {p.data_ptr() for p in peer.parameters()} == ours
    x, timesteps, context = INPUTS
    with torch.inference_mode(), diffusers_step(peer, x, context) as step:
        assert step(timesteps)[0].shape == x.shape


def test_tomesd_comes_and_goes():
    pytest.importorskip("diffusers")
    pytest.importorskip("tomesd")
    config = tiny_config()
    unet = build_unet(config, torch.float32, CPU)
    peer = diffusers_unet(config["model"]["params"]["unet_config"]["params"], unet)
    x, timesteps, context = INPUTS
    results = []
    with torch.inference_mode():
        for ratio in (0.0, 0.5, 0.0):
            with diffusers_step(peer, x, context, ratio) as step:
                results.append(step(timesteps)[0])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- measuring ----------------------------------------------------------------------------------


def contender(name, calls, kind="ours", error=None):
    """A setting that notes when it is called."""

    @contextmanager
    def apply():
        def step(timesteps):
            calls.append(name)
            if error is not None:
                raise error

        yield step

    return Contender(Row(CASE, name, kind), apply, [torch.zeros(2)])


@pytest.fixture
def _one_call_a_round(monkeypatch):
    monkeypatch.setattr(speed_module, "MIN_SECONDS", 0)


@pytest.mark.usefixtures("_one_call_a_round")
def test_contenders_take_turns(unet):
    calls = []
    found = [contender(name, calls, kind="oracle") for name in "abc"]
    visits = list(compare(found, unet, rounds=3))
    assert calls == list("abc") * 4  # the first to warm up
    assert visits == list("abc") * 5
    assert [len(c.row.ms) for c in found] == [3, 3, 3]


@pytest.mark.usefixtures("_one_call_a_round")
def test_failures_are_noted_and_the_others_go_on(unet):
    calls = []
    found = [
        contender("large", calls, error=RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        contender("strange", calls, kind="peer", error=AttributeError("no such\nthing")),
        contender("good", calls, kind="off"),
        contender("larger", calls, error=RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")),
        contender("odd", calls, kind="compiled", error=RuntimeError("Failed to find C compiler.")),
        contender("odder", calls, kind="graph", error=RuntimeError("not permitted")),
    ]
    list(compare(found, unet, rounds=2))
    assert [c.row.error for c in found] == [
        *("out of memory", "AttributeError: no such thing", "", "out of memory"),
        *("RuntimeError: Failed to find C compiler.", "RuntimeError: not permitted"),
    ]
    assert calls.count("large") == calls.count("strange") == 1
    assert len(found[2].row.ms) == 2


def test_our_own_failures_are_not_hidden(unet):
    found = [contender("broken", [], error=RuntimeError("a bug"))]
    with pytest.raises(RuntimeError, match="a bug"):
        list(compare(found, unet, rounds=1))


def test_short_steps_are_repeated(unet):
    calls = []
    list(compare([contender("short", calls)], unet, rounds=1))
    assert len(calls) == 1 + 2 * speed_module.MAX_REPEATS


@pytest.mark.parametrize(
    ("settings", "timesteps"),
    [
        ({"ratio": 0.5}, [500]),
        ({"ratio": 0.5, "reuse_steps": 2}, [750, 250]),
        ({"steps": [[0, 0.6], [0.7, 0]]}, [950, 850, 750, 650, 550, 450, 350, 250, 150, 50]),
    ],
)
def test_a_round_stands_for_a_whole_run(unet, settings, timesteps):
    configs = {"it": ToMeConfig.from_mapping(settings)}
    found = contenders(CASE, UNets(unet), 8, configs, has_oracles=False)
    assert [t.tolist() for t in found[1].timesteps] == [pytest.approx([t] * 2) for t in timesteps]


@pytest.mark.usefixtures("_one_call_a_round")
def test_a_case_is_measured(unet):
    settings = {name: from_preset(name) for name in ("fast", "tomesd")}
    found = contenders(CASE, UNets(unet), 8, settings)
    names = [(c.row.name, c.row.kind) for c in found]
    assert names == [
        ("off", "off"),
        *(("fast", "ours"), ("fast", "oracle"), ("tomesd", "ours"), ("tomesd", "oracle")),
    ]
    list(compare(found, unet, rounds=1))
    rows = [c.row for c in found]
    assert all(len(row.ms) == 1 and row.ms[0] > 0 and not row.error for row in rows)
    assert rows[1].report.startswith("ToMe: grid 4x4")
    assert rows[1].shares["match"] > 0
    assert rows[1].shares["unmerge"] == 0
    assert rows[3].shares["unmerge"] > 0
    assert sum(rows[3].shares.values()) < 1
    assert rows[0].shares == rows[2].shares == {}
    assert unet.tome.config.is_off


@pytest.mark.usefixtures("_one_call_a_round")
def test_attention_is_computed_as_the_case_says(unet):
    case = Case("tiny", 16, 2, "float32", "einsum")
    list(compare(contenders(case, UNets(unet), 8, {}), unet, rounds=1))
    assert {m.backend for m in unet.modules() if isinstance(m, CrossAttention)} == {"einsum"}


@pytest.mark.usefixtures("_one_call_a_round")
def test_upstreams_way():
    unet = build_unet(tiny_config(), torch.bfloat16, CPU)
    upstream = upstream_unet(tiny_config(), CPU)
    case = Case("tiny", 16, 2, "bfloat16", "sdpa")
    found = contenders(case, UNets(unet, upstream=upstream), 8, {})
    assert [c.row.name for c in found] == ["off", *UPSTREAM_STEPS]
    for contender, attention, is_ours in zip(
        found[1:], ("einsum", "sdpa", "sdpa"), (False, False, True), strict=True
    ):
        with contender.apply() as step, torch.inference_mode():
            assert step(torch.full((2,), 500.0)).dtype == torch.float32
        backends = {m.backend for m in upstream.modules() if isinstance(m, CrossAttention)}
        assert backends == {attention}
        assert all(p.is_contiguous() for p in upstream.parameters()) != is_ours
    list(compare(found, unet, rounds=1))
    assert all(c.row.error == "" and c.row.ms[0] > 0 for c in found)


@pytest.mark.usefixtures("_one_call_a_round")
def test_kernels_have_rows_where_they_can_match(unet, monkeypatch):
    settings = {name: from_preset(name) for name in ("fast", "tomesd")}
    args = CASE, UNets(unet), 8, settings, (), False
    found = contenders(*args, has_kernels=True)
    assert [(c.row.name, c.row.kind) for c in found] == [
        *(("off", "off"), ("fast", "ours"), ("fast", "kernels"), ("tomesd", "ours")),
    ]
    kinds = [c.row.kind for c in contenders(*args, has_graphs=True, has_kernels=True)]
    scope = benchmark.Scope(
        *({"tiny": {}}, [16], ["float32"], ["sdpa"], [1], settings, 1, False),
        has_graphs=True,
        has_kernels=True,
    )
    assert scope.n_visits([]) == len(kinds) * (1 + speed_module.N_EXTRA_ROUNDS)
    # tomesd draws random numbers for each call, for which no graph can stand
    assert kinds == ["off", "graph", "ours", "graph", "kernels", "kernels, graph", "ours"]
    seen = []
    monkeypatch.setattr(type(unet), "forward", lambda *_: seen.append(os.getenv("TOME_MATCHING")))
    monkeypatch.setenv("TOME_MATCHING", "whole")
    for contender in found[1:3]:
        with contender.apply() as step:
            step(torch.full((2,), 500.0))
    assert seen == ["whole", "triton"]
    assert os.environ["TOME_MATCHING"] == "whole"


@pytest.mark.usefixtures("_one_call_a_round")
def test_the_memory_of_a_graph_is_that_of_its_capture(unet, monkeypatch):
    class Graphs:
        def __call__(self, work):
            return lambda: None, work()

    calls, measured = [], []

    @contextmanager
    def peak_memory(device):
        peak, before = Peak(), len(calls)
        yield peak
        measured.append(len(calls) - before)
        peak.mib = float(len(measured))

    forward = type(unet).forward
    monkeypatch.setattr(captures_module, "CudaGraphs", Graphs)
    monkeypatch.setattr(speed_module, "peak_memory", peak_memory)
    monkeypatch.setattr(type(unet), "forward", lambda *args: calls.append(1) or forward(*args))
    found = contenders(CASE, UNets(unet), 8, {}, has_graphs=True)
    list(compare(found, unet, rounds=1))
    assert [c.row.kind for c in found] == ["off", "graph"]
    assert measured == [1, 2]  # the call; and one call as ever, with the capture
    assert [c.row.peak_mib for c in found] == [1.0, 2.0]


@pytest.mark.usefixtures("_one_call_a_round")
def test_compiled_blocks(unet, monkeypatch):
    compile_ = torch.nn.Module.compile

    def without_a_compiler(module, **options):
        compile_(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    compiled = compiled_unet(tiny_config(), unet)
    pairs = zip(unet.parameters(), compiled.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    found = contenders(CASE, UNets(unet, compiled), 8, {"fast": from_preset("fast")}, (), False)
    list(compare(found, unet, rounds=1))
    assert [(c.row.name, c.row.kind) for c in found] == [
        *(("off", "off"), ("off", "compiled"), ("fast", "ours"), ("fast", "compiled")),
    ]
    assert all(c.row.ms and not c.row.error for c in found)
    with torch.inference_mode():
        merged = []
        for contender in found[2:]:
            with contender.apply() as step:
                merged.append(step(torch.full((2,), 500.0)))
    torch.testing.assert_close(*merged)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_peak_memory_sees_what_is_freed_again():
    with peak_memory(CPU) as idle:
        pass
    with peak_memory(CPU) as busy:
        torch.ones(64 * 2**18)  # 64 MiB
    with peak_memory(CPU) as after:
        pass
    if idle.mib is None:
        pytest.skip("this system does not let the peak be reset")
    assert busy.mib - idle.mib == pytest.approx(64, abs=8)
    assert after.mib - idle.mib == pytest.approx(0, abs=8)


# --- the results --------------------------------------------------------------------------------


def rows():
    return [
        Row(CASE, "off", "off", ms=[100, 120, 110], peak_mib=8),
        Row(CASE, "fast", "ours", ms=[50, 40, 100], shares={"match": 0.02, "merge": 0.01}),
        Row(CASE, "fast", "oracle", ms=[48, 47, 40]),
        Row(CASE, "diffusers", "peer", error="out of memory"),
        Row(Case("tiny", 32, 2, "float32", "sdpa"), "fast", "ours", ms=[10]),
    ]


def test_figures_are_medians_and_their_ratios():
    off, ours, perfect, peer, other = figures(rows())
    assert (off["median_ms"], off["peak_mib"], off["speedup"]) == (110, 8, 1)
    assert ours["speedup"] == 110 / 50
    assert ours["speedup_range"] == [1.1, 3.0]
    assert ours["of_oracle"] == 47 / 50
    assert perfect["of_oracle"] is None
    assert peer["speedup"] is None
    assert peer["error"] == "out of memory"
    assert other["speedup"] is None  # nothing to compare it with in its case


def test_table():
    lines = table(rows()[:4]).splitlines()
    assert lines[2] == "| off | 110.0 | 1.00 | 1.00 to 1.00 |  | 8 |  |  |  |"
    assert lines[3] == "| fast | 50.0 | 2.20 | 1.10 to 3.00 | 94.0% |  | 2.0% | 1.0% |  |"
    assert lines[4].startswith("| fast, oracle | 47.0 |")
    assert lines[5].startswith("| diffusers | out of memory |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_our_fastest_against_upstreams_way():
    found = [
        *rows(),
        Row(CASE, "slow", "ours", ms=[60, 60, 60]),
        Row(CASE, "upstream's way", "peer", ms=[200, 240, 200]),
        Row(CASE, "the same, fused attention", "peer", ms=[160, 160, 160]),
        Row(CASE, "and our layout", "peer", ms=[110, 110, 110]),
        Row(Case("tiny", 64, 2, "float32", "sdpa"), "upstream's way", "peer", ms=[5]),
    ]
    (line,) = against_upstream(found)
    assert line.startswith(
        "tiny, 16x16, batch 2, float32, sdpa: fast is 4.00 times (2.00 to 6.00) as fast"
    )
    gains = "fused attention 1.25, layout and memory 1.45, type 1.00, merging 2.20"
    assert line.endswith(f"upstream's way: {gains}")
    assert against_upstream(rows()) == []


def test_results_are_written_whole(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"command": "it"}, rows())
    written = json.loads(path.read_text())
    assert written["command"] == "it"
    assert [row["median_ms"] for row in written["rows"]] == [110, 50, 47, None, 10]
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_measured_before_an_interruption_is_there(tmp_path, monkeypatch):
    def interrupted(found, unet, n_rounds):
        yield from itertools.islice(compare(found, unet, n_rounds), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "compare", interrupted)
    scope = benchmark.Scope(
        {"tiny": tiny_config()}, [16], ["float32"], ["sdpa"], [1], {}, 5, has_peers=False
    )
    with pytest.raises(KeyboardInterrupt) as stop:
        benchmark.measure(scope, CPU, tmp_path, "it")
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert len(row["ms"]) == 3
    assert stop.value.args == (f"what was measured is in {path}",)


def test_runs_of_one_second_have_files_of_their_own(tmp_path):
    paths = [benchmark._claimed(tmp_path, "now", {"command": name}) for name in "abc"]
    assert [path.name for path in paths] == ["now.json", "now-2.json", "now-3.json"]
    assert [json.loads(path.read_text())["command"] for path in paths] == ["a", "b", "c"]


@pytest.mark.usefixtures("_one_call_a_round")
@pytest.mark.parametrize("has_all", [False, True])
def test_progress_knows_the_number_of_visits(tmp_path, monkeypatch, has_all):
    visits = []

    def counted(*args):
        for name in compare(*args):
            visits.append(name)
            yield name

    monkeypatch.setattr(benchmark, "compare", counted)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: None)
    scope = benchmark.Scope(
        *({"tiny": tiny_config()}, [16], ["float32"], ["sdpa", "einsum"], [1]),
        {"fast": from_preset("fast")},
        rounds=1,
        has_oracles=has_all,
        has_compiled=has_all,
        has_peers=has_all,
        has_upstream=has_all,
    )
    benchmark.measure(scope, CPU, tmp_path, "it")
    assert len(visits) == scope.n_visits(benchmark.installed() if has_all else [])
    assert ("upstream's way" in visits) == has_all


@pytest.mark.parametrize(
    ("settings", "ratios"),
    [
        ({"ratio 0.25": 0.25, "ratio 0.9": 0.9, "ratio auto": "auto"}, [0.25]),
        ({"fast": 0.5}, [0.5]),
    ],
)
def test_tomesd_runs_at_the_same_ratios(settings, ratios):
    configs = {name: ToMeConfig(ratio=ratio) for name, ratio in settings.items()}
    assert benchmark.Scope({}, [], [], [], [], configs, 1).tomesd_ratios == ratios
