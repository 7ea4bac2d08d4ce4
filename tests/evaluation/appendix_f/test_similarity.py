import torch
import torch.nn.functional as F

from ldm.evaluation.appendix_f.similarity import TOMESD, _cosine, cosine_table, mean_cosines
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.merger import TokenMerger
from ldm.pipeline import Pipeline
from ldm.settings import Settings


def test_pairs_are_each_source_and_the_destination_that_took_it():
    merger = TokenMerger(ToMeConfig.from_mapping({**TOMESD, "random": False}))
    tokens = torch.randn(2, 16, 8)
    merger.begin_call(4, 4, torch.tensor([5]))
    decision = merger.block(tokens, (4, 4), 1)
    decision.plan, _ = plan_block(decision, [tokens])
    unit = F.normalize(tokens, dim=2)
    heads = [0, 2, 8, 10]  # the first of each 2x2 cell
    sources = [i for i in range(16) if i not in heads]
    best = (unit[:, sources] @ unit[:, heads].mT).amax(dim=2)
    expected = best.topk(8, dim=1).values.mean().item()  # the most similar half of the tokens
    assert abs(_cosine(decision, tokens) - expected) < 1e-5


def test_every_block_has_a_row_and_the_published_number_stands_below(tiny_checkpoint):
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint, device="cpu", dtype="float32", tome=False)
    settings = Settings("a house", steps=2).filled(pipeline.defaults)
    rows = mean_cosines(pipeline, settings, [("a house", 1), ("a house", 2)])
    assert [n for n, _ in rows] == [64, 16, 16, 16, 16, 64, 64][: len(rows)]
    assert all(-1 <= cosine <= 1 for _, cosine in rows)
    assert pipeline.model.model.diffusion_model.tome.config.is_off
    text = cosine_table(rows)
    assert text.endswith("| Stable Diffusion, published | | 0.86 |")
    assert text.count("\n") == len(rows) + 3
