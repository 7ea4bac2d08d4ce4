import pytest

from ldm.images import Gallery
from ldm.web.desk import Desk
from ldm.web.form import Base
from ldm.web.pictures import Pictures
from ldm.web.program import build_parser
from ldm.web.queue import Queue
from ldm.web.runner import Runner

ARGUMENTS = {
    **{"config": None, "device": "cpu", "dtype": "float32", "tome": None, "attention": "sdpa"},
    **{"ema": False, "parameterization": None, "vae": None},
}


@pytest.fixture
def runner(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.ckpt"
    broken.write_text("just some text")
    models = {"tiny": tiny_checkpoint, "broken": broken}
    return Runner(models, ARGUMENTS, Gallery(tmp_path / "out", has_grid=False))


@pytest.fixture
def desk(runner):
    queue = Queue(runner.work)
    yield Desk(runner, queue)
    queue.close()


@pytest.fixture
def base():
    return Base.from_arguments(build_parser().parse_args([]))


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path / "out")
