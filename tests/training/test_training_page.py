"""docs/training.md names recipes and keys that exist."""

import re
from pathlib import Path

from dsg.model.training.config import Recipe
from dsg.model.training.recipe_file import keys, load_recipe, recipes

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_setting_on_the_page_is_accepted():
    settings = [one for one in re.findall(r"--set (\S+=[^\s`]+)", PAGE) if one != "key=value"]
    assert len(settings) >= 8
    for setting in settings:
        companion = ["validation.every=5"] if "patience" in setting else []
        companion += ["model=htc_lite0_fpn"] if "overrides.semantic" in setting else []
        load_recipe("fast", [*companion, setting])


def test_the_table_holds_every_recipe():
    table = PAGE.split("## Recipes")[1].split("`--set key=value`")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == recipes()
    for name in recipes():
        recipe = load_recipe(name)
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        assert recipe.model in row
        assert f"{recipe.schedule.iterations or recipe.schedule.epochs:,}" in row


def test_the_page_names_every_section():
    sections = {key.split(".")[0] for key in keys() if "." in key}
    assert sections == set(re.findall(r"^\| `(\w+)` \|", PAGE.split("| section |")[1], re.MULTILINE))
    assert sections <= set(Recipe.__dataclass_fields__)


def test_names_of_keys_in_the_text_exist():
    named = re.findall(r"`((?:run|batch|validation|predict|optimizer|schedule|ema|augment)\.\w+)", PAGE)
    assert named and set(named) <= set(keys())
