from ldm.evaluation.appendix_f.measures import MEASURES, badness, is_above_floor


def test_for_high_frequencies_1_is_best_and_for_others_the_end():
    high = MEASURES["high_frequency_ratio"]
    assert badness(high, 1.0) < badness(high, 1.2) < badness(high, 0.7)
    assert badness(MEASURES["lpips"], 0.1) < badness(MEASURES["lpips"], 0.2)
    assert badness(MEASURES["ssim"], 0.9) < badness(MEASURES["ssim"], 0.8)


def test_nothing_is_claimed_above_the_floor():
    assert not is_above_floor("psnr_db", 56.0, 57.0)
    assert is_above_floor("psnr_db", 57.5, 57.0)
    assert is_above_floor("psnr_db", 60.0, None)  # nearer than rounding to 8 bits
    assert is_above_floor("high_frequency_ratio", 1.001, 0.99)
    assert not is_above_floor("ssim", 0.9999, None)
    assert not is_above_floor("attributes", 1.0, 0.9)  # no distance
