from ldm.evaluation.appendix_f.experiment import _time_that_counts
from ldm.evaluation.appendix_f.plan import Plan, Setting
from ldm.evaluation.appendix_f.speed import _kept
from ldm.evaluation.appendix_f.store import Store
from ldm.settings import Settings


def test_times_are_kept_for_the_machine_that_took_them(tmp_path):
    store, made = Store(tmp_path), {"keys": ["a"], "rounds": 2, "device": "cpu"}
    here = {"processor": "slow", "threads": 2, "load_before": 0.5}
    store.write_json("speed/own.json", {**made, "machine": here, "rows": [{"ms": 1.0}]})
    assert _kept(store, "speed/own.json", made, {**here, "load_before": 3.0}) == [{"ms": 1.0}]
    assert _kept(store, "speed/own.json", made, {**here, "processor": "fast"}) is None
    assert _kept(store, "speed/own.json", {**made, "rounds": 3}, here) is None
    assert _kept(store, "speed/other.json", made, here) is None


def test_fewer_steps_are_counted_by_times_of_the_same_size():
    rows = [
        {"model": model, "size": size, "key": "a", "speedup": speedup}
        for model, size, speedup in (("own", 256, 1.0), ("own", 512, 1.2), ("sd1.5", 512, 1.8))
    ]
    small, both, large = (
        Plan({size: (Setting("unmerged"),) for size in sizes}, ("a",), 1, Settings())
        for sizes in ((256,), (256, 512), (1024,))
    )
    assert _time_that_counts(small, rows) == ("own", {(256, "a"): 1.0})
    assert _time_that_counts(both, rows) == ("sd1.5", {(512, "a"): 1.8})
    assert _time_that_counts(large, rows) == ("own", {})
