"""Checkpoints from and to Hugging Face's form; the door to the modules beside this one.

    import_hf(directory, step_dir)    Hugging Face -> a step's directory
    export_hf(checkpoint, directory)  a step's directory (or Hugging Face's) -> Hugging Face
    export_peft(weights, directory)   a step's adapters -> PEFT's format
    load_hf_params(directory, tree)   Hugging Face -> arrays on devices, nothing written
    source_assets(directory)          what a run that starts from Hugging Face carries along
    read_hf_config(directory)         its configuration as ours

hf_names.py has the table of names and axes, hf_config.py the configurations, hf_tokenizer.py the tokenizer's
files, safetensors_stream.py the file format.
"""

from sealion_jax.checkpoint.hf_assets import source_assets
from sealion_jax.checkpoint.hf_config import model_json, read_hf_config, read_model_json
from sealion_jax.checkpoint.hf_export import export_hf
from sealion_jax.checkpoint.hf_import import Conversion, import_hf
from sealion_jax.checkpoint.hf_peft import export_peft
from sealion_jax.checkpoint.hf_weights import HfWeights, load_hf_params

__all__ = [
    "Conversion",
    "HfWeights",
    "export_hf",
    "export_peft",
    "import_hf",
    "load_hf_params",
    "model_json",
    "read_hf_config",
    "read_model_json",
    "source_assets",
]
