"""Adapters in PEFT's format: loaded onto the base, they give our logits and those of a merged export."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sealion_jax import cli, convert
from sealion_jax.checkpoint.hf import export_hf, export_peft, import_hf
from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.trees import load_params
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.errors import UserError
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.model.lora import LoraConfig, joined, parted
from sealion_jax.tokenizer import Tokenizer
from tests.checkpoint.adapters import EVERYTHING, MODULES, SOME, adapter, write_adapters
from tests.checkpoint.hf_models import (
    CONFIG,
    LAYERS,
    TEXT_VERSION_4,
    multimodal,
    random_tensors,
    text_shapes,
    vision_shapes,
    write_directory,
    write_step,
)
from tests.checkpoint.test_hf_transformers import TOKENS, made_by_transformers
from tests.tiny_text import tiny_tokenizer

transformers: Any = pytest.importorskip("transformers", minversion="5")
torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """Adapters on a base, exported, and as PEFT has loaded them."""

    base: Path
    step: Path
    lora: LoraConfig
    folder: Path
    model: Any

    @property
    def prefix(self) -> str:
        """Of the language model's modules in a PEFT model."""
        is_text = type(self.model.base_model.model).__name__ == "Gemma3ForCausalLM"
        return f"base_model.model.model.{'' if is_text else 'language_model.'}"


def text_base(folder: Path) -> tuple[Path, LoraConfig]:
    return made_by_transformers("text", folder / "hf"), EVERYTHING


def multimodal_base(folder: Path) -> tuple[Path, LoraConfig]:
    return made_by_transformers("multimodal", folder / "hf"), dataclasses.replace(EVERYTHING, alpha=6.0)


def version_4_base(folder: Path) -> tuple[Path, LoraConfig]:
    """Its tensors have other names than the modules that Transformers makes of them."""
    shapes = text_shapes("language_model.model.") | vision_shapes("", "vision_tower.")
    return write_directory(folder / "hf", multimodal(TEXT_VERSION_4), random_tensors(shapes)), SOME


@pytest.fixture(scope="module", params=[text_base, multimodal_base, version_4_base])
def adapted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("adapted")
    base, lora = request.param(folder)
    step = write_adapters(folder / "step", base, lora)
    export_peft(open_weights(str(step)), folder / "adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of tensors that it misses
        model = peft.PeftModel.from_pretrained(loaded(base), folder / "adapters")
    return Adapted(base=base, step=step, lora=lora, folder=folder, model=model)


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def our_logits(adapted: Adapted) -> np.ndarray:
    """Of our model with its adapters beside the weights, in float32."""
    weights = open_weights(str(adapted.step))
    plain, adapters = parted(abstract_params(CONFIG, lora=adapted.lora))
    assert weights.base is not None
    params = joined(weights.base.load(plain), load_params(adapted.step, adapters))
    bind = binder(CONFIG, compute=ComputeConfig(dtype="float32", remat="none"), lora=adapted.lora)
    tokens = jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def run(params: Any) -> jax.Array:
        model = bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens)))

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params))


def test_the_logits_are_ours_and_those_of_a_merged_export(adapted: Adapted, tmp_path: Path) -> None:
    """In float32, within 1e-4, logits being up to 8 (1.8e-5 seen)."""
    found = logits(adapted.model)
    np.testing.assert_allclose(found, our_logits(adapted), atol=1e-4)
    export_hf(adapted.step, tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(found, logits(loaded(tmp_path / "merged")), atol=1e-4)
    with adapted.model.disable_adapter():
        assert np.abs(found - logits(adapted.model)).max() > 1


def test_exactly_the_adapted_modules_have_adapters_and_these_are_ours(adapted: Adapted) -> None:
    found = {
        name: module
        for name, module in adapted.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    expected = {
        f"{adapted.prefix}layers.{layer}.{MODULES[target]}": (layer, target)
        for layer in range(LAYERS)
        for target in adapted.lora.targets
    }
    assert found.keys() == expected.keys()
    for name, (layer, target) in expected.items():
        a, b = adapter(adapted.step, layer, target)
        module, rank = found[name], adapted.lora.rank
        np.testing.assert_array_equal(module.lora_A["default"].weight.detach(), a.reshape(-1, rank).T)
        np.testing.assert_array_equal(module.lora_B["default"].weight.detach(), b.reshape(rank, -1).T)
        assert module.scaling["default"] == adapted.lora.alpha / rank


def test_peft_saves_what_we_write(adapted: Adapted, tmp_path: Path) -> None:
    adapted.model.save_pretrained(tmp_path)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapted.folder / "adapters", tmp_path)
    )
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (adapted.folder / "adapters", tmp_path)
    )
    assert ours == {name: theirs[name] for name in ours}
    assert ours["base_model_name_or_path"] == str(adapted.base)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


def test_what_was_tuned_on_chats_has_its_tokenizer_and_template(tiny: Tokenizer, tmp_path: Path) -> None:
    files = {
        "tokenizer.model": tiny.model_bytes,
        "chat_template.json": b'{"chat_template": "old"}',
        "generation_config.json": b'{"eos_token_id": 1}',
    }
    config = multimodal(TEXT_VERSION_4)
    tensors = random_tensors(text_shapes("language_model.model.") | vision_shapes("", "vision_tower."))
    base = write_directory(tmp_path / "hf", config, tensors, files=files)
    own = {"tokenizer.model": tiny.model_bytes, CHAT_TEMPLATE_FILE: CHAT_TEMPLATE.encode()}
    step = write_adapters(tmp_path / "step", base, SOME, assets=own)
    done = export_peft(open_weights(str(step)), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert "chat_template.json) is left out" in done.notes[0]
    assert done.notes[1].endswith("give generate() eos_token_id=[1, 106]") and len(done.notes) == 2
    export_hf(step, tmp_path / "merged")
    chat = [{"role": "user", "content": "Pagi!"}, {"role": "assistant", "content": "Pagi."}]
    ids = [
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).apply_chat_template(chat)
        for folder in (tmp_path / "out", tmp_path / "merged")
    ]
    assert ids[0]["input_ids"] == ids[1]["input_ids"] and tiny.end_of_turn_id in ids[0]["input_ids"]
    # The directory alone is enough: it says where the base is.
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert np.isfinite(logits(model)).all()


def test_where_the_base_stops_alike_nothing_is_told(tiny: Tokenizer, tmp_path: Path) -> None:
    files = {"tokenizer.model": tiny.model_bytes, "generation_config.json": b'{"eos_token_id": [1, 106]}'}
    tensors = random_tensors(text_shapes("model."))
    base = write_directory(tmp_path / "hf", TEXT_VERSION_4, tensors, files=files)
    own = {"tokenizer.model": tiny.model_bytes, CHAT_TEMPLATE_FILE: CHAT_TEMPLATE.encode()}
    step = write_adapters(tmp_path / "step", base, SOME, assets=own)
    assert export_peft(open_weights(str(step)), tmp_path / "out").notes == ()


def run(*argv: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(convert.main, [str(word) for word in argv])
    return stopped.value.code


def test_a_base_that_is_no_hugging_face_directory_needs_a_name(
    adapted: Adapted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_hf(adapted.base, tmp_path / "base")
    step = write_adapters(tmp_path / "step", tmp_path / "base", adapted.lora)
    assert run("to-peft", step, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"convert to-hf {tmp_path / 'base'} DIR, and give it as --base-name DIR" in told
    assert not (tmp_path / "out").exists()
    assert run("to-peft", step, tmp_path / "out", "--base-name", "google/gemma-3-4b-it") == 0
    assert f'next: AutoPeftModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in capsys.readouterr().out
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "google/gemma-3-4b-it"
    assert settings["target_modules"] == adapted.model.peft_config["default"].target_modules
    ours = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert ours == (adapted.folder / "adapters/adapter_model.safetensors").read_bytes()


def test_an_export_of_a_base_from_scratch_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_step(tmp_path / "base", CONFIG, {})
    step = write_adapters(tmp_path / "step", base, SOME)
    export_hf(base, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    export_peft(open_weights(str(step)), tmp_path / "out", base_name="exported")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "exported")
    export_hf(step, tmp_path / "merged")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(logits(model), logits(loaded(tmp_path / "merged")), atol=1e-4)


def test_what_cannot_be_written_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    for checkpoint in (adapted.base, write_step(tmp_path / "full", CONFIG, {})):
        with pytest.raises(UserError, match=r"holds no adapters \(LoRA\), .* to-hf .* DST"):
            convert.main(["to-peft", str(checkpoint), str(tmp_path / "out")])
    with pytest.raises(UserError, match="exists and is not empty; give another place"):
        convert.main(["to-peft", str(adapted.step), str(adapted.base)])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
