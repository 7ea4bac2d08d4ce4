import json

import pytest

from ldm.cli import img2img, options, txt2img
from ldm.cli.jobs import read_jobs
from ldm.errors import InputError


@pytest.fixture
def jobs(tmp_path):
    """Read a file of these lines, with flags beside it."""

    def read(*lines, flags=(), program=txt2img):
        path = tmp_path / "prompts.txt"
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8")
        argv = ["--from-file", str(path), *flags]
        return read_jobs(program.build_parser().parse_args(argv))

    return read


def pictures(jobs):
    return [picture for job in jobs for batch in job.settings.batches() for picture in batch]


def test_a_command_line_is_one_run():
    argv = ["--prompt", "x", "--tome-ratio", "0.5"]
    (job,) = read_jobs(txt2img.build_parser().parse_args(argv))
    assert (job.settings.prompt, job.tome.keys) == ("x", {"ratio": 0.5})


def test_lines_that_are_prompts_are_one_run(jobs):
    (job,) = jobs("hills", "# no", "", "the sea", flags=["--n_samples", "2", "--seed", "5"])
    assert list(job.settings.batches()) == [[("hills", 5), ("the sea", 6)]]


def test_a_line_has_settings_over_those_of_the_command_line(jobs):
    line = {
        "prompt": "hills",
        "steps": 30,
        "sampler": "euler_a",
        "fixed_code": True,
        "negative_prompt": "-blurry, grey",
        "tome": {"ratio": 0.4, "stride": [2, 4], "random": True},
        "tome.max_downsample": 2,
    }
    first, second = jobs(line, "the sea", flags=["--steps", "9", "--tome-window", "5"])
    assert (first.settings.steps, first.settings.sampler) == (30, "euler_a")
    assert (first.settings.fixed_code, first.settings.negative_prompt) == (True, "-blurry, grey")
    assert first.tome.keys == {
        "ratio": 0.4,
        "stride": [2, 4],
        "random": True,
        "window": 5,
        "max_downsample": 2,
    }
    assert second.tome.keys == {"window": 5}
    assert (second.settings.steps, second.settings.sampler) == (9, None)


def test_null_and_false_take_a_flag_back(jobs):
    line = {"prompt": "x", "steps": None, "long_prompt": False, "plms": True}
    (job,) = jobs(line, flags=["--steps", "9", "--long_prompt"])
    settings = job.settings
    assert (settings.steps, settings.long_prompt, settings.sampler) == (None, False, "plms")


def test_lines_with_the_same_settings_are_drawn_together(jobs):
    lines = [{"prompt": p, "steps": s} for p, s in (("a", 2), ("b", 2), ("c", 3))]
    assert [job.settings.prompt for job in jobs(*lines)] == [("a", "b"), ("c",)]


def test_each_line_has_the_seed_of_its_place_unless_it_names_one(jobs):
    lines = [
        "a",
        {"prompt": "b", "steps": 3},
        {"prompt": "c", "seed": 9},
        {"prompt": "d", "seed": 9},
    ]
    found = jobs(*lines, "e", flags=["--seed", "5"])
    assert pictures(found) == [("a", 5), ("b", 6), ("c", 9), ("d", 9), ("e", 9)]
    repeated = jobs(*lines[1:3], flags=["--seed", "5", "--repeat", "2"])
    assert pictures(repeated) == [("b", 5), ("b", 6), ("c", 9), ("c", 10)]


def test_a_chosen_seed_counts_for_the_whole_file(jobs):
    found = pictures(jobs("a", {"prompt": "b", "steps": 3}, flags=["--seed", "-1"]))
    assert found[1][1] == found[0][1] + 1


def test_the_prompt_may_come_from_the_command_line(jobs, caplog):
    lines = [{"scale": 3}, {"scale": 5}]
    assert pictures(jobs(*lines, flags=["--prompt", "x"])) == [("x", 42), ("x", 43)]
    assert pictures(jobs("a", {"scale": 3}, flags=["--prompt", "x"])) == [("a", 42), ("x", 43)]
    assert caplog.messages == []
    assert pictures(jobs("a", flags=["--prompt", "x"])) == [("a", 42)]
    assert caplog.messages == [
        "--prompt is not drawn: the lines of --from-file have prompts of their own"
    ]


def test_img2img_has_its_own_flags_in_a_line(jobs):
    line = {"prompt": "x", "strength": 0.3}
    (job,) = jobs(line, flags=["--init-img", "photo.png"], program=img2img)
    assert job.settings.strength == 0.3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x", "stepz": 3}, "line 2: 'stepz' is no setting of a picture"),
        ({"prompt": "x", "ckpt": "a"}, "line 2: 'ckpt' is no setting of a picture"),
        ({"prompt": "x", "help": True}, "line 2: 'help' is no setting of a picture"),
        ({"prompt": "x", "steps": 0}, "line 2: steps 0: allowed is 1 to 1000"),
        ({"prompt": "x", "steps": "many"}, "line 2: steps: must be a whole number, not 'many'"),
        ({"prompt": "x", "fixed_code": 3}, "line 2: fixed_code 3: allowed is true or false"),
        ({"prompt": "x", "tome": {"ratio": 2}}, "line 2: --tome-ratio 2: must be auto or a number"),
        ({"steps": 3}, "line 2: there is no prompt in it"),
        ({"prompt": 3}, "line 2: prompt: must be a text, not 3"),
        ("{prompt: x}", "line 2: not a JSON object"),
    ],
)
def test_a_bad_line_is_named(jobs, line, message):
    with pytest.raises(InputError, match=message):
        jobs("a prompt", line)


def test_programs_that_take_prompts_alone_say_so(tmp_path):
    from ldm.evaluation import visualize as visualize_tome

    path = tmp_path / "p.txt"
    path.write_text('{"prompt": "x"}')
    args = visualize_tome.build_parser().parse_args(["--from-file", str(path)])
    with pytest.raises(InputError, match=r"p\.txt, line 1: here a line is a prompt, not JSON"):
        options.settings(args)


def test_a_lora_that_is_not_there_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "lora").mkdir(parents=True)
    (tmp_path / "models" / "lora" / "ink.safetensors").touch()
    (tmp_path / "p.txt").write_text('a <lora:ink:0.5> house\n{"prompt": "b <lora:oil>"}\n')
    message = r"p.txt, line 2: lora 'oil': not in models/lora, where there are: ink"
    with pytest.raises(InputError, match=message):
        read_jobs(options.parse(txt2img.build_parser(), ["--from-file", str(tmp_path / "p.txt")]))
    for prompt in ("<lora:oil>", "<lora:../lora/ink>", f"<lora:{tmp_path}/models/lora/ink>"):
        with pytest.raises(InputError, match="not in models/lora, where there are: ink"):
            read_jobs(options.parse(txt2img.build_parser(), ["--prompt", prompt]))
