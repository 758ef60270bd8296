"""How each family writes its sizes in config.json. A new family is a reader and a line here."""

from collections.abc import Callable

from sim.models.config_file import ConfigFile
from sim.models.dimensions import Architecture
from sim.models.families.dbrx import read_dbrx
from sim.models.families.gpt2 import read_gpt2
from sim.models.families.llama import read_llama
from sim.models.families.mistral import read_mistral, read_mixtral
from sim.models.families.qwen import read_qwen2, read_qwen2_moe, read_qwen3, read_qwen3_moe

READERS: dict[str, Callable[[str, ConfigFile], Architecture]] = {
    "dbrx": read_dbrx,
    "gpt2": read_gpt2,
    "llama": read_llama,
    "mistral": read_mistral,
    "mixtral": read_mixtral,
    "qwen2": read_qwen2,
    "qwen2_moe": read_qwen2_moe,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
}
"""Reader of each `model_type`. It takes the name to give and the values of the file."""
