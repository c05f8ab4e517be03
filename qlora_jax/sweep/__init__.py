"""Runs the grid of cells that an experiment declares, stores the results and analyses them."""

from qlora_jax.sweep.experiment import Analysis as Analysis
from qlora_jax.sweep.experiment import Cell as Cell
from qlora_jax.sweep.experiment import Context as Context
from qlora_jax.sweep.experiment import Estimate as Estimate
from qlora_jax.sweep.experiment import Experiment as Experiment
from qlora_jax.sweep.experiment import Input as Input
from qlora_jax.sweep.experiment import Population as Population
from qlora_jax.sweep.experiment import Rows as Rows
from qlora_jax.sweep.experiment import Verdict as Verdict
from qlora_jax.sweep.table import Table as Table
from qlora_jax.sweep.table import markdown as markdown
