"""The whole way: a Hugging Face checkpoint is trained on, evaluated, exported, and Transformers agrees."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from sealion_jax import convert, evaluate, train
from tests.checkpoint.hf_models import (
    TEXT_VERSION_4,
    multimodal,
    random_tensors,
    text_shapes,
    vision_shapes,
    write_directory,
)
from tests.tiny_run import TinyWorld, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_from_hugging_face_through_training_and_back(world, tmp_path):
    """bits per byte of `evaluate` on the export are those of Transformers on the same files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vision = random_tensors(vision_shapes(), seed=1)
    source = write_directory(
        tmp_path / "source",
        multimodal(TEXT_VERSION_4),
        random_tensors(text_shapes("language_model.model.")) | vision,
        num_shards=2,
        files={
            "tokenizer.model": (world.folder / "tokenizer.model").read_bytes(),
            "chat_template.jinja": b"{{ messages }}",
        },
    )
    run_dir, exported, scores = tmp_path / "run", tmp_path / "exported", tmp_path / "scores.json"
    recipe = tmp_path / "from_hf.py"
    text = (world.folder / "tiny.py").read_text()
    # The shapes are the checkpoint's own.
    recipe.write_text(text.replace("model=Gemma3Config(", f"init_from={str(source)!r}, model=None and dict("))
    words = [str(recipe), "--run-dir", str(run_dir), "--evaluation.sets", "none", "--steps"]
    train.main([*words, "2"])
    # From here on the run stands alone: it goes on, and is exported, without what it started from.
    shutil.rmtree(source)
    train.main([*words, "3"])
    convert.main(["to-hf", str(run_dir), str(exported)])
    assert (exported / "chat_template.jinja").read_bytes() == b"{{ messages }}"

    evaluate.main(
        [str(exported), "--data", world.held_out, "--output", str(scores), "--context-tokens", "64"]
    )
    documents = json.loads(scores.read_text())["documents"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    with open(world.held_out, encoding="utf-8") as lines:
        texts = {str(row["id"]): row["text"] for row in map(json.loads, lines)}
    for document in documents[:6]:
        ids = torch.tensor([tokenizer(texts[document["id"]])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits[0, :-1].double()
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).sum()
        assert document["tokens"] == ids.shape[1] - 1
        assert document["log_prob"] == pytest.approx(float(picked), rel=1e-5)

    from safetensors.numpy import load_file

    tensors = {
        name: array for file in exported.glob("*.safetensors") for name, array in load_file(file).items()
    }
    for name, array in vision.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
