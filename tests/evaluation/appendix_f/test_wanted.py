import pytest

from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import Plan, Setting
from ldm.evaluation.appendix_f.wanted import chosen_against
from ldm.settings import Settings

NAMES = ("unmerged", "tomesd", "kv, keys", "kv, keys, everywhere", "a, 3/4", "b, 3/4")


@pytest.fixture
def plan():
    return Plan({64: tuple(map(Setting, NAMES))}, ("x",), 1, Settings())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tomesd, kv, keys", ["tomesd", "kv, keys"]),
        ("kv,keys,everywhere,tomesd,", ["kv, keys, everywhere", "tomesd"]),
        ("kv, keys, kv, keys, everywhere", ["kv, keys", "kv, keys, everywhere"]),
        ("a, 3/4,b, 3/4,a, 3/4", ["a, 3/4", "b, 3/4"]),
        ("", []),
        (None, ["tomesd"]),
    ],
)
def test_names_with_commas_can_be_listed(plan, text, names):
    assert chosen_against(text, plan) == names


@pytest.mark.parametrize(("text", "part"), [("kv", "kv"), ("tomesd, 3/4", "3/4")])
def test_a_part_of_a_name_is_refused_with_the_names(plan, text, part):
    with pytest.raises(InputError, match=rf"^--against {part}: the settings are unmerged; tomesd;"):
        chosen_against(text, plan)
