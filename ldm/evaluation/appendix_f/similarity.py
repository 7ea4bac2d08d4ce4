"""How alike the tokens are that merging joins in a model, beside what is published of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.benchmark.unets import transformer_blocks
from ldm.evaluation.merge_map import destinations
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.plan import MergePlan
from ldm.pipeline import Pipeline
from ldm.sampling import Texts, sample
from ldm.settings import Settings

PUBLISHED = 0.86  # ToMe on Stable Diffusion at ratio 0.5; Fourier-TM (NeurIPS 2025), table 1
# Matching as in tomesd, in the blocks of all resolutions.
TOMESD = {"ratio": 0.5, "metric": "hidden", "window": None, "random": True, "proportional": False}


def mean_cosines(
    pipeline: Pipeline, settings: Settings, batch: Sequence[tuple[str, int]]
) -> list[tuple[int, float]]:
    """Tokens, and mean cosine of the merged pairs, of each block of the U-Net in its order.

    Pairs are a source and the destination that it is merged into, as in tomesd at ratio 0.5; the
    mean is over pairs, pictures and steps.

    Args:
        pipeline: whose own merging comes back afterwards.
        settings: how to draw, without None.
        batch: prompts and seeds.
    """
    merger = pipeline.model.model.diffusion_model.tome
    found: dict[int, list[float]] = defaultdict(list)
    sizes: list[int] = []

    def planner(decision: Decision, metrics: Sequence[Tensor]) -> tuple[MergePlan, MergePlan]:
        plan, queries = plan_block(decision, metrics)
        decision.plan = plan
        if len(sizes) < n_blocks:
            sizes.append(decision.n_tokens)
        found[counted[0] % n_blocks].append(_cosine(decision, metrics[0]))
        counted[0] += 1
        return plan, queries

    n_blocks, counted = len(transformer_blocks(pipeline.model.model.diffusion_model)), [0]
    with merger.planned_by(planner, ToMeConfig.from_mapping({**TOMESD, "max_downsample": 8})):
        sample(pipeline.model, settings, batch, Texts(pipeline.model, settings))
    return [(n, sum(found[i]) / len(found[i])) for i, n in enumerate(sizes)]


def _cosine(decision: Decision, tokens: Tensor) -> float:
    """Mean over the merged pairs of a block, tokens (B, N, C)."""
    plan = decision.plan
    assert plan is not None
    assert plan.groups is not None
    n = decision.n_tokens
    groups = plan.groups.view(len(tokens), n)
    groups = groups - torch.arange(len(tokens), device=groups.device)[:, None] * plan.n_kept
    heads = torch.from_numpy(destinations(decision)).to(groups.device).expand(len(tokens), -1)
    head_of = torch.full((len(tokens), plan.n_kept), -1, device=groups.device)
    head_of.scatter_(1, groups.gather(1, heads), heads)
    into = head_of.gather(1, groups)
    is_source = (into >= 0) & (into != torch.arange(n, device=groups.device))
    flat = tokens.float()
    merged = flat.gather(1, into.clamp(min=0)[..., None].expand_as(flat))
    return F.cosine_similarity(flat, merged, dim=2)[is_source].mean().item()


def cosine_table(rows: Sequence[tuple[int, float]]) -> str:
    """A Markdown table of `mean_cosines`, with the published number below."""
    lines = ["| block | tokens | mean cosine of merged pairs |", "|---|---|---|"]
    lines += [f"| {i} | {n} | {cosine:.2f} |" for i, (n, cosine) in enumerate(rows)]
    top = [cosine for n, cosine in rows if n == max(n for n, _ in rows)]
    lines.append(f"| full resolution | {max(n for n, _ in rows)} | {sum(top) / len(top):.2f} |")
    lines.append(f"| Stable Diffusion, published | | {PUBLISHED:.2f} |")
    return "\n".join(lines)
