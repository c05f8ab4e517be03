"""Shows the training examples that the program makes of people's records.

Every data file below FOLDER is read and encoded as by `train --preview`. Its first examples are
shown, with the tokens that carry loss marked. A chat_template.jinja next to a file is used as
`data.chat_template`. A folder named `folder` is read as one data set.

Expected: each file is read, with one line about records that are left out, or refused in one line.
Cost: a second for each file.
Command: python -m experiments.tools.records FOLDER [--model MODEL] [--examples N]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.config import Config, DataConfig, ModelConfig
from qlora_jax.data import files
from qlora_jax.data.preview import preview
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.examples import describe_data, read_data
from qlora_jax.train.setup import open_model

TEMPLATE = "chat_template.jinja"


def main(arguments: list[str]) -> int:
    """Previews every source below a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="its tokenizer is used")
    parser.add_argument("--examples", type=int, default=2, help="examples to show per file")
    options = parser.parse_args(arguments)
    for source in sources(options.folder):
        print(f"=== {source.relative_to(options.folder)}")
        print(described(source, options.model, options.examples))
    return 0


def sources(folder: Path) -> Iterator[Path]:
    """Yields the data files and the folders of data files below a folder."""
    whole = [path for path in sorted(folder.rglob("folder")) if path.is_dir()]
    yield from whole
    for path in sorted(folder.rglob("*")):
        if files.ending(path) in files.READERS and not any(w in path.parents for w in whole):
            yield path


def described(source: Path, model: str, examples: int) -> str:
    """Returns the first examples of a source and its description, or why it is refused."""
    beside = source.with_name(TEMPLATE)
    config = Config(
        model=ModelConfig(path=model),
        data=DataConfig(
            source=str(source),
            eval_fraction=0,
            chat_template=str(beside) if beside.is_file() else None,
        ),
        output="",
    )
    try:
        checkpoint, text = open_model(config)
        data = read_data(config, text, checkpoint.config.longest_cached)
    except UserError as e:
        return f"refused: {e}"
    return f"{preview(data.train, text, examples).plain}{describe_data(data)}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
