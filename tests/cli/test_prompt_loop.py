import pytest

from ldm.cli import options, txt2img
from ldm.cli.prompt_loop import prompt_loop
from ldm.errors import InputError


@pytest.fixture
def loop(monkeypatch):
    """Run the loop over some lines; what was drawn, and the Token Merging settings."""

    def run(*lines, flags=(), draw=None):
        drawn, tome = [], []
        typed = iter(lines)

        def read(question):
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        def set_tome(settings):
            settings.over(None)
            tome.append(settings.keys)

        monkeypatch.setattr("builtins.input", read)
        args = txt2img.build_parser().parse_args(list(flags))
        prompt_loop(options.wishes(args), set_tome, draw or drawn.append)
        return drawn, tome

    return run


def test_each_line_is_drawn_until_the_input_ends(loop):
    drawn, tome = loop("\ufeffhills", "", "  the sea ", "none", flags=["--steps", "7"])
    assert [settings.prompt for settings in drawn] == ["hills", "the sea", "none"]
    assert {settings.steps for settings in drawn} == {7}
    assert tome == []


def test_settings_hold_until_they_are_taken_back(loop):
    drawn, _ = loop("a", "!set steps 030", "!set dpm", "b", "!unset steps", "c", "!quit", "d")
    made = [(s.prompt, s.steps, s.sampler) for s in drawn]
    assert made == [("a", None, None), ("b", 30, "dpm_solver"), ("c", None, "dpm_solver")]


def test_token_merging_is_set_as_it_goes(loop):
    _, tome = loop(
        "!set tome.ratio 0.4",
        "!set tome.stride 2 4",
        "!set tome.hires.ratio 0.6",
        "!unset tome.ratio",
        flags=["--tome-window", "5"],
    )
    assert tome[0] == {"window": 5, "ratio": 0.4}
    assert tome[2] == {"window": 5, "ratio": 0.4, "stride": [2, 4], "hires": {"ratio": 0.6}}
    assert tome[3] == {"window": 5, "stride": [2, 4], "hires": {"ratio": 0.6}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!set steps 0", "steps 0: allowed is 1 to 1000"),
        ("!set steps", "steps: give a value, too"),
        ("!set tome.ratio 0.9", "can remove at most 0.75"),
        ("!set tome.k 2", "both set the amount"),
        ("!set ckpt x", "'ckpt' is no setting of a picture"),
        ("!set", "the commands are !set NAME VALUE"),
        ("!nonsense", "the commands are"),
        ('!set prompt "x', "No closing quotation"),
    ],
)
def test_a_bad_command_changes_nothing_and_the_loop_goes_on(loop, capsys, line, message):
    drawn, tome = loop("!set tome.ratio 0.5", line, "!set seed 3", "a")
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert (drawn[0].steps, drawn[0].seed) == (None, 3)
    assert tome == [{"ratio": 0.5}, {"ratio": 0.5}]


def test_a_picture_that_fails_or_is_stopped_does_not_end_the_loop(loop, capsys):
    def draw(settings):
        raise KeyboardInterrupt if settings.prompt == "a" else InputError("no memory")

    loop("a", "b", "!show", draw=draw)
    assert capsys.readouterr().err == "stopped\nerror: no memory\n"


def test_too_little_memory_does_not_end_the_loop(loop, capsys):
    def draw(settings):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    loop("a", "b", draw=draw)
    assert capsys.readouterr().err.count("error: there is not enough memory: try") == 2


def test_what_is_set_is_shown(loop, capsys):
    loop("!set negative_prompt grey, blurry", "!set tome.stride 2 4", "!set long_prompt", "!show")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-4:-1] == ["negative-prompt grey, blurry", "long-prompt True", "tome-stride 2 4"]


def test_a_random_seed_is_chosen_for_each_picture_and_not_before(loop, caplog):
    caplog.set_level("INFO", "ldm")
    drawn, _ = loop("!set seed -1", "a", "b")
    assert drawn[0].seed != drawn[1].seed
    assert len(caplog.messages) == 2
