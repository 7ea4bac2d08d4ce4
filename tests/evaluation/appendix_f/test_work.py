import pytest

from ldm.config import load_config
from ldm.evaluation.appendix_f.plan import Setting
from ldm.evaluation.appendix_f.work import Work, count_work, unet_outline
from ldm.modules.tome.config import ToMeConfig


def test_what_reused_deep_features_save_grows_with_the_steps_that_reuse_them():
    merging = ToMeConfig(ratio=0.5)
    settings = {
        "none": Setting("none"),
        "merging": Setting("merging", merging),
        "2": Setting("2", sampling={"reuse_deep": 2}),
        "4": Setting("4", sampling={"reuse_deep": 4}),
        "both": Setting("both", merging, sampling={"reuse_deep": 2}),
    }
    unet = unet_outline(load_config("configs/demo/unet.yaml"))
    found = count_work(unet, settings, 16, 16)
    assert found["none"] == Work(0, 0)
    # half of the calls reuse them, or three in four
    assert found["4"].saved_whole == pytest.approx(1.5 * found["2"].saved_whole)
    assert found["4"].saved_attention == pytest.approx(1.5 * found["2"].saved_attention)
    assert 0.1 < found["2"].saved_whole < 0.5
    for name in ("saved_whole", "saved_attention"):
        alone = [getattr(found[one], name) for one in ("merging", "2")]
        # blocks at full size are merged whether or not the others are reused
        assert max(alone) < getattr(found["both"], name) <= sum(alone) + 1e-9
    assert unet.reuse.every == 1
    similar = Setting("similar", ToMeConfig(ratio=0.5, metric="hidden", similarity=0.9))
    most = Setting("most", ToMeConfig(ratio=0.5, metric="hidden"))
    found = count_work(unet, {"similar": similar, "most": most}, 16, 16)
    assert found["similar"].saved_attention == found["most"].saved_attention > 0
