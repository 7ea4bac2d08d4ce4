from pathlib import Path

import pytest
import yaml

from ldm.config import load_config
from ldm.errors import InputError
from ldm.evaluation.appendix_f import program
from ldm.evaluation.docs import check, fill, make_docs, markdown
from ldm.images import load_rgb

ROOT = Path(__file__).parents[2]
TEXT = "before\n<!-- table main -->\n| old |\n<!-- end of table -->\nafter\n"


def row(setting, psnr, ratio=None, above=()):
    measures = {"psnr_db": {"mean": psnr, "low": psnr - 1, "high": psnr + 1}}
    measures["attributes"] = {"mean": 0.9938, "low": 0.9, "high": 1.0}
    own = {"tome": {"ratio": ratio}, "saved_work": 0.66, "above_floor": list(above)}
    return {"size": 16, "setting": setting, "measures": measures, **own}


def test_a_table_has_what_its_columns_name():
    rows = [row("half", 40.0, 0.5), row("half 0.25", 60.0, 0.25, ["psnr_db"])]
    columns = {
        "left": "all 16 work_left",
        "25 %": "all 16 psnr_db@0.25",
        "50 %": "all 16 psnr_db+@0.5",
        "75 %": "all 16 psnr_db@0.75",
        "found": "all 16 attributes@0.5",
    }
    table = {"columns": columns, "rows": {"`half`": "half"}}
    assert markdown(table, {"all": rows}, "main").splitlines() == [
        "| | left | 25 % | 50 % | 75 % | found |",
        "|---|---|---|---|---|---|",
        "| `half` | 34 % | *60.0* | 40.0 [39.0, 41.0] |  | 99.4 % |",
    ]
    with pytest.raises(InputError, match="table main: all has no setting 'most' at 16"):
        markdown({"columns": columns, "rows": {"most": "most"}}, {"all": rows}, "main")


def test_a_document_without_a_place_is_named():
    assert fill(TEXT, "main", "| new |\n", Path("a.md")) == TEXT.replace("old", "new")
    with pytest.raises(InputError, match=r"a\.md: there must be one place for the table other"):
        fill(TEXT, "other", "", Path("a.md"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tables": {"a": {"file": "a.md", "rows": {}}}}, "table a: it needs file, columns and"),
        ({"columns": {"dB": "all psnr_db"}}, "table main: dB: all psnr_db: allowed is an exper"),
        ({"columns": {"dB": "other 16 psnr_db"}}, r"allowed is an experiment \(all\), a size"),
        ({"columns": {"dB": "all 16 psnr"}}, "table main: dB: psnr: measures are work_left, "),
        ({"pictures": {"a.png": {"take": "b.png"}}}, "picture a.png: it needs take, and"),
        ({"pictures": {"a.png": {"experiment": "all"}}}, "picture a.png: it needs take, and"),
        ({"pictures": {"a.png": None}}, "picture a.png: it needs take, and"),
    ],
)
def test_a_list_that_cannot_be_made_is_said_before_anything_is_drawn(wrong, message, tmp_path):
    columns = {"dB": "all 16 psnr_db+@0.5", **wrong.pop("columns", {})}
    table = {"file": "a.md", "columns": columns, "rows": {"it": "half"}}
    spec = {"experiments": {"all": []}, "tables": {"main": table}, "pictures": {}, **wrong}
    with pytest.raises(InputError, match=message):
        make_docs(spec, tmp_path, tmp_path / "out", True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["docs", "ranking"])
def test_the_shipped_lists_fit_the_documents(name):
    spec = load_config(f"configs/study/{name}.yaml")
    check(spec)
    for name, table in spec["tables"].items():
        fill((ROOT / table["file"]).read_text(encoding="utf-8"), name, "", Path(table["file"]))
        for what in table["columns"].values():
            assert what.split()[0] in spec["experiments"]
    for flags in spec["experiments"].values():
        flags = [*spec.get("common", ()), *flags]
        program.check(program.build_parser().parse_args([str(flag) for flag in flags]))


def test_one_command_makes_tables_and_pictures(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("a house\nthe sea\n")
    (tmp_path / "mine.yaml").write_text("half: {ratio: 0.5}\n")
    model = ["--ckpt", str(tiny_checkpoint), "--device", "cpu", "--dtype", "float32"]
    drawn = ["--from-file", "prompts.txt", "--settings", "mine.yaml", "--sizes", 16]
    spec = {
        "experiments": {"all": [*model, *drawn, "--steps", 2, "--no-controls", "--speed", ""]},
        "tables": {
            "main": {"file": "a.md", "columns": {"dB": "all 16 psnr_db"}, "rows": {"it": "half"}}
        },
        "pictures": {
            "one.png": {
                "program": "ldm.evaluation.tome_grid",
                "flags": [*model, "--ratios", "0.5", "--prompt", "a house", "--steps", 2],
                "take": "grid-0000.png",
            }
        },
    }
    (tmp_path / "docs.yaml").write_text(yaml.safe_dump(spec))
    program.main(["--docs", "docs.yaml", "--quick", "--outdir", "out", *model])
    assert (tmp_path / "a.md").read_text() == TEXT  # a rehearsal
    first = (tmp_path / "out/rehearsal/a.md").read_text()
    assert "| it | " in first
    assert "old" not in first
    make_docs(spec, tmp_path, tmp_path / "whole", False)
    assert "| it | " in (tmp_path / "a.md").read_text()
    assert load_rgb(tmp_path / "one.png").shape[1] == 2 * (256 + 2) + 2
