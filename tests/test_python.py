"""`fsl_cli.load()` and what follows, from Python."""

import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

import fsl_cli
from fsl_cli import loading
from fsl_cli.classifier import Classifier

pytestmark = pytest.mark.usefixtures("workplace")


def test_python_names_mistakes_too(models, drawings):
    source = fsl_cli.load(models / "protonet" / "best.pt")
    image = "support/oak/0.png"
    with pytest.raises(ValueError, match="2 images, but 1 labels"):
        source.adapt([image, image], ["a"])
    with pytest.raises(ValueError, match="1 class, expected two or more"):
        source.adapt([image, image], ["a", "a"])
    with pytest.raises(ValueError, match="is not an image that can be read"):
        source.adapt([__file__, image], ["a", "b"])
    with pytest.raises(ValueError, match="no such file"):
        fsl_cli.load("nowhere.pt")
    for word, said in {
        "querry=1": "There is no key querry. Did you mean query?",
        "size=some": "size = 'some', but it must be a whole number",
        "algo=none": "algo = 'none', but there is no configs/algo/none.yaml",
        "size": "size cannot be read as key=value",
        "reject_below=0.9": "reject_below is not read here: it is an argument of a classifier.",
        "task.way=7": "task.way = 7, but the support says how many classes there are",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            fsl_cli.load(models / "protonet" / "best.pt", word)
    for label in (None, "", float("nan"), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match=r"^Label 2 is .*, expected the name of a class"):
            source.adapt([image, image], ["a", label])
    for labels in (None, "ab", 3):
        with pytest.raises(ValueError, match=r"^The labels are .*, expected a list of them"):
            source.adapt([image, image], labels)  # pyright: ignore[reportArgumentType]
    assert source.adapt([image, image], torch.tensor([7, 10])).names == ["10", "7"]
    for wrong in ({"device": "cpu"}, 3):
        with pytest.raises(ValueError, match=r"^The option .* is no text"):
            fsl_cli.load(models / "protonet" / "best.pt", wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"^The first argument is .*, expected the name of a file"):
            fsl_cli.load(wrong)  # pyright: ignore[reportArgumentType]
    classifier = source.adapt([image, image], ["a", "b"])
    for one in (image, Path(image), Image.new("L", (28, 28)), b"bytes", None, np.zeros((28, 28, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"^The images are .*, expected a list of them\. Put a single one into brackets\.$"):
            classifier(one)  # pyright: ignore[reportArgumentType]
    for wrong in ("auto", 5, -0.1, True, float("nan")):
        with pytest.raises(ValueError, match=f"^reject_below = {wrong}, but it must be a probability from 0 to 1, or None; what"):
            classifier([image], reject_below=wrong)  # pyright: ignore[reportArgumentType]
    assert classifier([image], reject_below=1)[0].label == "unknown"
    assert classifier([image], reject_below=cast(float, np.float32(0)))[0].label != "unknown"
    for none in ([], iter(())):
        with pytest.raises(ValueError, match="There are no images, expected a list of one or more"):
            classifier(none)


def test_arrays_are_images_or_are_told_what_they_should_be(models, drawings):
    classifier = fsl_cli.load(models / "protonet" / "best.pt").adapt(["support/oak/0.png", "support/birch/0.png"], ["a", "b"])
    grey = np.asarray(Image.open("support/oak/1.png"))
    colour = np.stack([grey] * 3, -1)
    tensor = torch.from_numpy(colour.transpose(2, 0, 1).copy())
    deep = [grey.astype(kind) * factor for kind, factor in ((np.uint16, 1), (np.int64, 1), (np.uint16, 257), (np.float16, 1))]
    same = [grey[..., None], colour, colour / 255, colour.transpose(2, 0, 1), tensor, tensor / 255, tensor[:1], *deep]
    flat, *others = classifier([grey, *same, np.stack([grey])[0], grey / 255])
    assert all(other == flat for other in others)
    assert classifier(torch.stack([tensor, tensor])) == [flat, flat]
    assert classifier(np.stack([grey, grey])) == [flat, flat]
    classifier.save("new/folder/mine")
    assert fsl_cli.load_classifier("new/folder/mine")([grey, grey]) == classifier([grey, grey])
    for found, shown in {
        "five channels": (np.stack([grey] * 5, -1), r"ndarray uint8 \[28, 28, 5\]"),
        "complex": (grey.astype(np.complex64), r"ndarray complex64 \[28, 28\]"),
        "empty": (grey[:0], r"ndarray uint8 \[0, 28\]"),
        "a row": (grey[0], r"ndarray uint8 \[28\]"),
        "no pixels": (Image.new("L", (0, 5)), r"<PIL\.Image\.Im.*"),
        "nothing": (None, "None"),
        "bytes": (b"PNG", "b'PNG'"),
    }.values():
        with pytest.raises(ValueError, match=rf"^Image 2 is {shown}, expected a file name, a Pillow image, or an array or"):
            classifier([grey, found])
    Image.effect_noise((60, 60), 50).save("whole.png")
    Path("short.png").write_bytes(Path("whole.png").read_bytes()[:1000])
    said = r"^Image 2 is not an image that can be read \(.*truncated.*\)\. Replace it"
    with Image.open("short.png") as short, pytest.raises(ValueError, match=said):
        classifier([grey, short])


def test_python_works_inside_a_hydra_program(models, drawings):
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("fsl_cli.configs", version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        assert isinstance(fsl_cli.load(models / "protonet" / "best.pt").adapt(["support/oak/0.png"] * 2, ["a", "b"]), Classifier)
        assert GlobalHydra.instance().hydra is mine
        assert compose("train", overrides=["out=x"]).steps > 0


def test_the_package_imports_nothing_slow_until_it_is_used():
    script = "import sys, fsl_cli, fsl_cli.cli; assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert fsl_cli.load is loading.load
    with pytest.raises(AttributeError):
        fsl_cli.nothing  # noqa: B018 # pyright: ignore
