"""Reads the headers of a model that is split into several .gguf files (llama-gguf-split)."""

import re
from pathlib import Path

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import GgufHeader, read_header

MOST_PARTS = 1000
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
COUNT, INDEX = "split.count", "split.no"


def read_parts(path: Path) -> GgufHeader:
    """Returns the header of a .gguf file; for a split model, with the tensors of all parts.

    The metadata of the model and its tokenizer are in the first part.

    Args:
      path: the file, or the first part of a split model.

    Raises:
      UserError: a file is missing or damaged, `path` is not the first part, or two parts hold
        tensors of the same name.
    """
    header = read_header(path)
    count = header.metadata.get(COUNT, 1)
    if not isinstance(count, int) or not 1 <= count <= MOST_PARTS:
        raise UserError(f"{path}: metadata {COUNT} is {count!r}; expected 1 to {MOST_PARTS}")
    if count == 1:
        return header
    name = PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise UserError(
            f"{path}: is one of {count} parts of a model; restore its original name, "
            f"NAME-00001-of-{count:05}.gguf"
        )
    files = [path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if path != files[0]:
        raise UserError(f"{path}: part {int(name[2])} of {count}; give the first: {files[0]}")
    if absent := [file.name for file in files if not paths.is_file(file)]:
        raise UserError(
            f"{path}: {absent[0]} is missing beside it, {len(absent)} of {count} parts are "
            "missing; download them"
        )
    tensors = dict(header.tensors)
    for i, file in enumerate(files[1:], start=1):
        part = read_header(file)
        if part.metadata.get(INDEX) != i or part.metadata.get(COUNT) != count:
            raise UserError(
                f"{file}: its metadata says part {part.metadata.get(INDEX)!r} of "
                f"{part.metadata.get(COUNT)!r}, counted from 0, which is not the part in its name; "
                "download it again"
            )
        if both := tensors.keys() & part.tensors.keys():
            raise UserError(f"{file}: holds {min(both)}, as another part does; download all again")
        tensors |= part.tensors
    return GgufHeader(header.metadata, tensors)
