"""Files of prompts, and lines that are typed at the prompt."""

import json
from collections import Counter

from ldm.cli import options, txt2img
from ldm.cli.jobs import read_jobs
from ldm.cli.prompt_loop import prompt_loop
from ldm.modules.tome.config import ToMeConfig
from tests.fuzz.fuzzing import cases, damaged, json_value, outcome, told, value

NAMES = [
    "prompt",
    "steps",
    "seed",
    "sampler",
    "tome",
    "tome.ratio",
    "tome_preset",
    "no_tome",
    "plms",
]
NAMES += ["scale", "H", "n_iter", "emphasis", "ckpt", "outdir", "help", "--help", "from_file", "x"]


def line(chance):
    """A prompt, a comment, or JSON."""
    kind = chance.randrange(4)
    if kind == 0:
        return value(chance)
    said = {"prompt": "hills", **{chance.choice(NAMES): json_value(chance) for _ in range(2)}}
    return json.dumps(said, ensure_ascii=chance.random() < 0.5)


def test_a_file_of_prompts_is_read_or_refused_with_its_line(tmp_path):
    path = tmp_path / "prompts.txt"
    counts = Counter()
    for number, chance in cases(150):
        lines = [line(chance) for _ in range(chance.randrange(4))]
        text = chance.choice(["\n", "\n", "\r\n", "\u2028"]).join(["hills", *lines])
        encoding = chance.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1"])
        data = text.encode(encoding, "ignore")
        path.write_bytes(damaged(data, chance) if chance.random() < 0.3 else data)
        argv = ["--from-file", str(path), "--repeat", chance.choice(["1", "2", "100000"])]
        args = txt2img.build_parser().parse_args(argv)
        counts[outcome(lambda args=args: read_jobs(args), ("prompts", number, data))] += 1
    told("files of prompts", counts)
    assert counts["works"]
    assert counts["refused"]


def test_no_typed_line_ends_the_loop_or_changes_another_flag(monkeypatch, capsys):
    counts = Counter()
    for number, chance in cases(150):
        kind = chance.choice(["!set", "!set", "!unset", "!show", "!help", value(chance)])
        typed = f"{kind} {chance.choice(NAMES)} {value(chance)}"
        lines = iter([typed, "hills", "!quit"])
        drawn = []
        monkeypatch.setattr("builtins.input", lambda question, lines=lines: next(lines))
        args = txt2img.build_parser().parse_args(["--steps", "9"])

        def loop(args=args, drawn=drawn):
            prompt_loop(
                options.wishes(args),
                lambda tome: ToMeConfig.from_mapping(tome or {}),
                drawn.append,
            )

        outcome(loop, ("typed", number, typed))
        told_errors = capsys.readouterr().err
        assert told_errors.count("\n") <= 1, typed
        assert drawn[-1].prompt == "hills" or told_errors, typed
        counts["refused" if told_errors else "works"] += 1
    told("typed lines", counts)
    assert counts["works"]
    assert counts["refused"]
