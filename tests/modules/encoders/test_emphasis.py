"""The web UIs' marks in a prompt: read as they read them, or named."""

import pytest

from ldm.errors import InputError
from ldm.modules.encoders.emphasis import BREAK, parse_emphasis, plain_text, syntax_remarks


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a house", [("a house", 1)]),
        ("", []),
        ("a (red) house", [("a ", 1), ("red", 1.1), (" house", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(red:1.4) house", [("red", 1.4), (" house", 1)]),
        ("(red: .5)", [("red", 0.5)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("[(b:2)]", [("b", 2 / 1.1)]),
        ("time 12:30", [("time 12:30", 1)]),
        (r"\(red\) \[b\] \\", [("(red) [b] \\", 1)]),
        (r"a\b \: (c\:2)\ ", [("ab : ", 1), ("c", 2), (" ", 1)]),
        (r"(a\)b)", [("a)b", 1.1)]),
        ("a smile :) and ) and ]", [("a smile :) and ) and ]", 1)]),
        ("(open [b] :1.2", [("open ", 1.1), ("b", 1), (" :1.2", 1.1)]),
        ("[a:1.2)", [("a:1.2)", 1 / 1.1)]),
        ("a (((house:1.3)) b", [("a ", 1), ("house", 1.573), (" b", 1.1)]),
        ("([a)] b", [("a b", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("a BREAK (b BREAK c)", [("a", 1), BREAK, ("b", 1.1), BREAK, ("c", 1.1)]),
        ("BREAKS", [("BREAKS", 1)]),
    ],
)
def test_emphasis_is_read_as_the_web_uis_do(prompt, pieces):
    found = parse_emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_plain_text_is_what_is_read():
    assert plain_text("a ((red)) [house:2] (sun:1.3)") == "a red house:2 sun"


def test_huge_weights_are_refused():
    with pytest.raises(InputError, match=r"emphasis 1e\+06 of 'red': allowed are -100 to 100"):
        parse_emphasis("a (red:1000000)")


def test_brackets_are_open_in_bounds():
    assert parse_emphasis("[" * 50 + "(" * 50 + "red")[0][1] == pytest.approx(1)
    with pytest.raises(InputError, match=r"'\[\(\[\(.*\.\.\.' in a prompt: more than 100 brackets"):
        parse_emphasis("[(" * 10_000 + "red")


def test_a_chunk_ends_at_the_word_alone_with_its_spaces():
    for prompt in ("a BREAK b", "a  BREAK \n b", "a\nBREAK b"):
        assert parse_emphasis(prompt) == [("a", 1.0), BREAK, ("b", 1.0)]
    assert parse_emphasis(" BREAK BREAK") == [BREAK, BREAK]
    assert parse_emphasis("BREAKS a_BREAK") == [("BREAKS a_BREAK", 1.0)]


@pytest.mark.parametrize("prompt", ["a (red:1.2)", "a (red (sun):1.2)", "((red))", "[[red]]"])
def test_weights_that_are_not_read_are_named(prompt):
    (said,) = syntax_remarks(prompt)
    assert "--emphasis reads the web UIs' emphasis" in said
    assert not list(syntax_remarks(prompt, has_emphasis=True))


def test_flags_of_other_programs_are_named():
    (said,) = syntax_remarks("a castle --ar 16:9 --v 5")
    assert said == "'--ar' in a prompt is read as words, not as a flag"
    assert not list(syntax_remarks("a castle -- by the sea--shore, 1920--30"))


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a [cat:dog:0.5] b", "prompt editing"),
        ("a [cat:0.5]", "prompt editing"),
        ("a [cat::0.5]", "prompt editing"),
        ("a [:cat: 10 ]", "prompt editing"),
        ("a [cat:dog:.25]", "prompt editing"),
        ("a [cat:dog:1e-1]", "prompt editing"),
        ("a [[cat:dog:0.2]:hen:0.7]", "prompt editing"),
        (r"a [c\]at:dog:0.5]", "prompt editing"),
        ("a [(red:1.2):blue:0.3]", "prompt editing"),
        ("a [cat:dog:-0.5]", "prompt editing"),
        ("a [[cat] b:dog:0.5]", "prompt editing"),
        ("a [cat|dog|hen]", "alternating words"),
        ("a [[cat] b|dog]", "alternating words"),
        ("a [cat|the [dog]]", "alternating words"),
        ("a [|cat]", "alternating words"),
        ("a cat AND a dog :1.2", "AND"),
        (r"a \[cat:dog:0.5\]", ""),
        (r"a \[cat|dog\]", ""),
        ("a [cat [dog] hen] 5:0.5", ""),
        ("a [cat] at 5:30, sand|sea", ""),
    ],
)
def test_what_is_not_included_is_named(prompt, kind):
    for has_emphasis in (True, False):
        said = " ".join(syntax_remarks(prompt, True, has_emphasis))
        assert (f"the web UIs' {kind} is not included" in said) == bool(kind)
        assert kind or "not included" not in said


@pytest.mark.parametrize(
    ("prompt", "mark", "what"),
    [
        ("a __colour__ cat", "__colour__", "wildcards"),
        ("a __animals/big-*__", "__animals/big-*__", "wildcards"),
        ("a {red|blue} cat", "{red|blue}", "choices in braces"),
        ("a {2$$red|blue|} cat", "{2$$red|blue|}", "choices in braces"),
        ("a {{red}} cat", "{red}", "emphasis in braces"),
        ("a 1.3::red :: cat", "1.3::", "emphasis by ::"),
        ("-2::fog::", "-2::", "emphasis by ::"),
        ("a cat++, red", "t++", "such emphasis"),
        ("a (red cat)+", ")+", "such emphasis"),
        ("a (red cat)--, sun", ")--", "such emphasis"),
        ("a (red cat)1.3", ")1.3", "such emphasis"),
        ('("a cat", "a dog").blend(1, 0.5)', ").blend(", "blending"),
        ("a cat by embedding:ink", "embedding:", "an embedding's name"),
    ],
)
def test_other_programs_syntax_is_named(prompt, mark, what):
    for has_emphasis in (True, False):
        said = [one for one in syntax_remarks(prompt, True, has_emphasis) if what in one]
        assert len(said) == 1
        assert said[0].startswith(f"{mark!r} in a prompt is read as words: {what}")
        assert said[0].endswith(" not included")


@pytest.mark.parametrize(
    "prompt",
    [
        "a house (built 1920)-style, at 5:30, 35mm (film) - f/1.8, snake_case, __init, 50% :: 3",
        r"a \{smile\}, std::vector, 16:9, sea--shore, C+, 20++, (red:1.2), (red) 1.5, (a)-(b)",
        "my embedding: ink; a.blend(b); [cat] [fog]",
    ],
)
def test_what_only_looks_like_it_is_left_alone(prompt):
    assert not list(syntax_remarks(prompt, True, True))


@pytest.mark.parametrize(
    "text", ["{", "{|", "__", "__a", "1::", "++", "a+", ")-", ")1", ").", "1."]
)
def test_remarks_about_a_long_text_take_no_time(text):
    assert sum(1 for _ in syntax_remarks(text * 50_000, True, True)) <= 10
