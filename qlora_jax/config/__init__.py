"""Config of a run: all settings, and the functions that read, check and write a config."""

from qlora_jax.config.load import changed as changed
from qlora_jax.config.load import difference as difference
from qlora_jax.config.load import digest as digest
from qlora_jax.config.load import dump as dump
from qlora_jax.config.load import load_config as load_config
from qlora_jax.config.load import parse_overrides as parse_overrides
from qlora_jax.config.schema import Setting as Setting
from qlora_jax.config.schema import all_settings as all_settings
from qlora_jax.config.schema import is_known as is_known
from qlora_jax.config.schema import nearest as nearest
from qlora_jax.config.settings import Config as Config
from qlora_jax.config.settings import DataConfig as DataConfig
from qlora_jax.config.settings import FloatType as FloatType
from qlora_jax.config.settings import KernelsConfig as KernelsConfig
from qlora_jax.config.settings import LoraConfig as LoraConfig
from qlora_jax.config.settings import MeshConfig as MeshConfig
from qlora_jax.config.settings import ModelConfig as ModelConfig
from qlora_jax.config.settings import ModelSettings as ModelSettings
from qlora_jax.config.settings import OptimizerConfig as OptimizerConfig
from qlora_jax.config.settings import PretrainConfig as PretrainConfig
from qlora_jax.config.settings import QuantConfig as QuantConfig
from qlora_jax.config.settings import TrainConfig as TrainConfig
from qlora_jax.config.tree import from_settings as from_settings
from qlora_jax.config.tree import from_tree as from_tree
from qlora_jax.config.tree import model_settings as model_settings
from qlora_jax.config.tree import to_tree as to_tree
