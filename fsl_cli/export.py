"""`fsl export classifier=FILE format=torch|onnx`: a single file that maps images to probabilities without fsl."""

import importlib
import importlib.util
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fsl_cli import folders, loading
from fsl_cli.classifier import Classifier
from fsl_cli.errors import RunError, out_of_memory, run_and_report
from fsl_cli.schema import Format, register

log = logging.getLogger(__name__)

SUFFIX = {Format.torch: ".pt2", Format.onnx: ".onnx"}
PROBES = (1, 2, 5)  # batch sizes on which the written file is checked
TOLERANCE = 1e-4  # largest accepted difference of a probability

register()


def prepare(overrides: list[str]) -> list[str]:
    """Returns the overrides unchanged."""
    return overrides


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """Runs one export."""
    run_and_report(run, cfg)


def run(cfg: DictConfig) -> None:
    """Writes a draft file, compares its answers with those of the classifier, and then renames it to the output."""
    if cfg.classifier is None:
        raise ValueError("classifier has no value. Name a file that fsl adapt wrote: classifier=my_classifier.")
    suffix = SUFFIX[cfg.format]
    name = cfg.output or f"{cfg.classifier}{suffix}"
    if Path(name).suffix != suffix:
        raise ValueError(f"output = {name}, but format={cfg.format.value} writes files that end in {suffix}. Name it so.")
    output = folders.new(name, "output")
    if cfg.format == Format.onnx:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"format = onnx needs packages that are not installed: pip install {' '.join(missing)}.")
    classifier = loading.load_classifier(cfg.classifier, "device=cpu")
    if classifier.trained.what == "texts":
        raise ValueError(f"classifier = {cfg.classifier} takes texts, and only those of images can be exported. Use fsl predict.")
    draft = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        try:
            answers = (write_torch if cfg.format == Format.torch else write_onnx)(classifier, draft)
        except RuntimeError as error:  # the exporter cannot trace every network for a variable batch
            if out_of_memory(error):
                raise
            trained = classifier.trained
            raise RunError(
                f"classifier = {cfg.classifier}: algo = {trained.origin['choices']['algo']} under norm = {trained.algo.norm} "
                f"cannot be exported by format={cfg.format.value} ({str(error).splitlines()[0]}). "
                "Use fsl predict, or adapt with another algorithm or norm."
            ) from error
        difference = compare(classifier, answers)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    shape = ", ".join(str(size) for size in classifier.trained.shape)
    log.info(
        f"{output}: images uint8 [n, {shape}] -> probabilities [n, {len(classifier.names)}] of {', '.join(classifier.names)}"
    )
    log.info(f"Its answers differ from those of {cfg.classifier} by at most {difference:.1g} on {sum(PROBES)} images.")


class Standalone(nn.Module):
    """A classifier as one network: items uint8 `[n, C, H, W]` -> probabilities `[n, way]`."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.algo = classifier.trained.algo.to(memory_format=torch.contiguous_format)  # the only layout that is stored exactly
        self.probabilities = classifier.probabilities

    def forward(self, items: Tensor) -> Tensor:
        return self.probabilities(items.float() / 255)


def probe(classifier: Classifier, images: int) -> Tensor:
    """Items of noise, uint8 `[images, C, H, W]`; the same in every call."""
    return torch.randint(256, (images, *classifier.trained.shape), generator=torch.Generator().manual_seed(images)).byte()


@torch.no_grad()
def write_torch(classifier: Classifier, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes the classifier by `torch.export`; returns the written file as a function."""
    dynamic = ({0: torch.export.Dim("images")},)
    program = torch.export.export(Standalone(classifier).eval(), (probe(classifier, 2),), dynamic_shapes=dynamic)
    written = io.BytesIO()  # if torch wrote the file, it would hide the error of a full disk
    torch.export.save(program, written, extra_files={"classes.json": json.dumps(classifier.names)})
    path.write_bytes(written.getvalue())
    return torch.export.load(path).module()


@torch.no_grad()
def write_onnx(classifier: Classifier, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes the classifier as ONNX; returns the written file as a function."""
    onnxruntime = importlib.import_module("onnxruntime")
    program = torch.onnx.export(
        Standalone(classifier).eval(),
        (probe(classifier, 2),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("images")},),
    )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(classifier.names)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda items: torch.from_numpy(session.run(None, {"images": items.numpy()})[0])


@torch.no_grad()
def compare(classifier: Classifier, answers: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of a probability between classifier and written file; RunError if above TOLERANCE."""
    items = [probe(classifier, images) for images in PROBES]
    found = max((answers(part) - classifier.probabilities(part.float() / 255)).abs().max().item() for part in items)
    if not found <= TOLERANCE:
        raise RunError(f"The written file differs from the classifier by {found:.2g} in a probability. It was not kept.")
    return found
